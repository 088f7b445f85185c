"""What a run looks like: pictures of what was measured, and one page that holds all of it."""
