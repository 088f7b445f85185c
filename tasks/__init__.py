"""The steps of the flow, one per file, on the machinery in ``tasks.engine``."""
