"""Documents become the token ids of the model's own tokenizer, each with one BOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.engine.encoding import encode_documents, encode_joined, files_digest, load_tokenizer
from tasks.engine.errors import InputError
from tasks.engine.source import Source, open_source
from tasks.engine.text import read_documents
from tests.models import DEMO_MODEL
from tests.tasks.engine.texts import ANY, DOCUMENTS, plain, save_rows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{{ eos_token }}"
)


@pytest.fixture
def model_with(tmp_path: Path) -> Callable[..., Source]:
    """The demo model with another tokenizer configuration."""

    def make(**changes: Any) -> Source:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in DEMO_MODEL.iterdir():
            if file.name != "tokenizer_config.json":
                (folder / file.name).symlink_to(file)
        described = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text()) | changes
        kept = {key: value for key, value in described.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        return open_source(folder)

    return make


def test_files_digest_sees_every_file(source: Source, model_with: Callable[..., Source]) -> None:
    assert files_digest(source) != files_digest(model_with(chat_template=TEMPLATE))


def test_one_bos_before_each_document(source: Source, tokenizer: Any) -> None:
    encoded = encode_documents(ANY, load_tokenizer(source), DOCUMENTS)
    assert encoded == [[0, *plain(tokenizer, document)] for document in DOCUMENTS]


def test_one_bos_before_joined_documents(source: Source, tokenizer: Any) -> None:
    ids = encode_joined(ANY, load_tokenizer(source), DOCUMENTS)
    assert ids == [0, *plain(tokenizer, "\n\n".join(DOCUMENTS))]
    assert ids.count(0) == 1


def test_a_tokenizer_is_read_once_for_files_that_stay_as_they_are(
    model_with: Callable[..., Source],
) -> None:
    model = model_with()
    loaded = load_tokenizer(model)
    assert load_tokenizer(model) is loaded
    described = model.path / "tokenizer_config.json"
    written = described.with_suffix(".new")
    written.write_text(json.dumps(json.loads(described.read_text()) | {"chat_template": TEMPLATE}))
    written.replace(described)
    assert load_tokenizer(model).chat_template == TEMPLATE != loaded.chat_template


def test_tokenizer_without_bos(model_with: Callable[..., Source], tokenizer: Any) -> None:
    loaded = load_tokenizer(model_with(bos_token=None))
    assert loaded.bos_token_id is None
    assert encode_joined(ANY, loaded, DOCUMENTS) == plain(tokenizer, "\n\n".join(DOCUMENTS))
    assert encode_documents(ANY, loaded, DOCUMENTS[:1]) == [plain(tokenizer, DOCUMENTS[0])]


def test_messages_go_through_the_chat_template(
    tmp_path: Path, model_with: Callable[..., Source], tokenizer: Any
) -> None:
    chats = [
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}],
        [{"role": "user", "content": "When?"}],
    ]
    text = save_rows(tmp_path, "jsonl", [{"messages": chat} for chat in chats])
    loaded = load_tokenizer(model_with(chat_template=TEMPLATE))
    encoded = encode_documents(text, loaded, read_documents(text))
    # the template writes BOS and end of text itself: no second BOS
    written = ["[user] Where?\n[assistant] Here.\n", "[user] When?\n"]
    assert encoded == [[0, *plain(tokenizer, chat), 1] for chat in written]
    assert encode_joined(text, loaded, read_documents(text)) == encoded[0] + encoded[1]


def test_messages_without_a_template(tmp_path: Path, source: Source) -> None:
    text = save_rows(tmp_path, "jsonl", [{"messages": [{"role": "user", "content": "Where?"}]}])
    with pytest.raises(InputError, match=r"calib: .* no chat template"):
        encode_documents(text, load_tokenizer(source), read_documents(text))


def test_a_conversation_that_the_template_refuses(
    tmp_path: Path, model_with: Callable[..., Source]
) -> None:
    strict = "{{ raise_exception('System role not supported') }}"
    text = save_rows(tmp_path, "jsonl", [{"messages": [{"role": "system", "content": "Be."}]}])
    with pytest.raises(InputError, match=r"calib: .* \(System role not supported\); remove such"):
        encode_documents(
            text, load_tokenizer(model_with(chat_template=strict)), read_documents(text)
        )
