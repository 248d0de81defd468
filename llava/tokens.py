"""Text to ids and labels, id for id as LLaVA-1.5 was trained, masked by construction.

The reference is the slow Llama tokenizer of transformers 4.37 with `legacy=False`. Newer
transformers cannot reproduce it (they lose leading spaces and merge runs of spaces differently),
so this uses the sentencepiece package on `tokenizer.model`. Every token knows the characters it
stands for; it is supervised if one of them is. Nothing is tokenised twice to find offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers
import torch
import xxhash
from sentencepiece import sentencepiece_model_pb2

from llava.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    Segment,
    Template,
    render,
)
from llava.errors import DataError, UsageError

SPACE = "▁"  # how sentencepiece spells a space

Span = tuple[int, int]


class Encoded(NamedTuple):
    """One conversation: ids with the image as IMAGE_TOKEN_INDEX, and labels, int64, (L,) each.

    A label is the id itself where the model is supervised and IGNORE_INDEX elsewhere.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


class Tokenizer:
    """What every vocabulary offers. `encode` and `decode` are the subclass's own."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int
    """One more than the largest id that text can become (image and padding rows come after)."""

    def __init__(self, content: bytes) -> None:
        self._digest = xxhash.xxh3_128_hexdigest(content)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of one chunk without BOS, and the characters `text[begin:end]` each stands for."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; image, padding and special ids are left out."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        return self._digest


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`, as the slow `legacy=False` Llama tokenizer reads it.

    A chunk gets one space in front unless it begins with a special token; text after a special
    token gets none. `added` are further special tokens, name to id.
    """

    def __init__(self, model: bytes, added: dict[str, int]) -> None:
        super().__init__(model + json.dumps(added, sort_keys=True).encode())
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        proto.normalizer_spec.add_dummy_prefix = False  # the one space is put in by hand
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        known = [self._model.unk_id(), self._model.bos_id(), self._model.eos_id()]
        pieces = {self._model.id_to_piece(id_): id_ for id_ in known if id_ >= 0}
        self._special = {**pieces, **added}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._guard = self._model.id_to_piece(self._model.unk_id())
        self._guard_length = len(self._model.encode(self._guard))
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.pad_id = self._model.unk_id()  # LLaVA-1.5 pads with <unk>
        self.vocab_size = max(self._model.get_piece_size(), 1 + max(self._special.values()))

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for part in self._split(text.replace(SPACE, " ")):
            if part in self._special:
                ids.append(self._special[part])
                spans.append((position, position + len(part)))
            elif part:
                prefix = SPACE if not ids else ""
                part_ids, part_spans = self._encode_plain(prefix + part)
                ids += part_ids
                shift = position - len(prefix)
                # A lone prefix stands for the first character of the text that it introduces.
                spans += [(max(b + shift, 0), max(e + shift, 1)) for b, e in part_spans]
            position += len(part)
        return ids, spans

    def _encode_plain(self, text: str) -> tuple[list[int], list[Span]]:
        # Models trained to strip leading spaces would strip ours: put something in front of it.
        guarded = text.startswith((SPACE, " "))
        guard, skip = (self._guard, self._guard_length) if guarded else ("", 0)
        encoding = self._model.encode_as_offset_mapping(guard + text)
        spans = [(max(b - len(guard), 0), e - len(guard)) for b, e in encoding["offsets"][skip:]]
        return encoding["ids"][skip:], _filled(spans)

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self._special.values())
        size = self._model.get_piece_size()
        plain = [int(i) for i in ids if 0 <= int(i) < size and int(i) not in special]
        return self._model.decode(plain).removeprefix(" ")


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` through the tokenizers package, for vocabularies that have only that."""

    def __init__(self, content: str, config: dict[str, Any]) -> None:
        super().__init__(content.encode() + json.dumps(config, sort_keys=True).encode())
        state = json.loads(content)
        # As LLaVA had it: a literal <image> in text-only data is ordinary text.
        kept = [t for t in state.get("added_tokens", []) if t["content"] != IMAGE_TOKEN]
        state["added_tokens"] = kept
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._id_of(config, "eos_token", "</s>")
        opening = self._tokenizer.encode("").ids  # what its own template puts in front
        if config.get("add_bos_token"):
            opening = [self._id_of(config, "bos_token", "<s>")]
        self.bos_id = opening[0] if opening and opening[0] != self.eos_id else None
        padding = [self._id_of(config, "pad_token", "<pad>"), self._id_of(config, "unk_token", "")]
        self.pad_id = next((i for i in [*padding, self.eos_id] if i is not None), 0)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    def _id_of(self, config: dict[str, Any], key: str, default: str) -> int | None:
        return self._tokenizer.token_to_id(_content(config.get(key)) or default)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, _filled([(b, max(e, 1)) for b, e in encoding.offsets])

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) != self.pad_id]
        return self._tokenizer.decode(plain, skip_special_tokens=True).removeprefix(" ")


def _filled(spans: list[Span]) -> list[Span]:
    """Give a token without characters those of the next one.

    A character outside the vocabulary becomes several byte tokens; only the last one has its span.
    """
    filled = list(spans)
    for index in range(len(filled) - 2, -1, -1):
        if filled[index][0] == filled[index][1]:
            filled[index] = filled[index + 1]
    return filled


def _content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, an object or null."""
    return token.get("content") if isinstance(token, dict) else token


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a directory or file; `tokenizer.model` is preferred to `tokenizer.json`.

    Raises UsageError if there is neither, or it cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.model", "tokenizer.json") if path.is_dir() else (path.name,)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UsageError(f"{path}: no tokenizer.model or tokenizer.json here")
    config = _read_json(folder / "tokenizer_config.json")
    try:
        if file.suffix == ".json":
            return JsonTokenizer(file.read_text(encoding="utf-8"), config)
        return SentencePieceTokenizer(file.read_bytes(), _added_tokens(folder, config))
    except Exception as error:  # both packages raise bare Exception or their own types
        raise UsageError(f"{file}: not a readable tokenizer ({error})") from error


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Special tokens beside the sentencepiece model, but for the image's and the padding's.

    Those two are added by Hugging Face exports; LLaVA-1.5 read both words as ordinary text.
    """
    added = {_content(t): int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    added.update(_read_json(folder / "added_tokens.json"))
    of_words = {IMAGE_TOKEN, "<pad>"}
    return {text: id_ for text, id_ in added.items() if text not in of_words}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error


def tokenize(segments: Sequence[Segment], tokenizer: Tokenizer, n_images: int) -> Encoded:
    """Ids and labels of rendered segments, BOS first.

    With images (at most `n_images` placeholders; 0: `<image>` is plain text), the text before,
    between and after the placeholders is encoded independently, as LLaVA does, so that each piece
    begins with its own space. Raises DataError on more placeholders.
    """
    text = "".join(segment.text for segment in segments)
    chunks = text.split(IMAGE_TOKEN) if n_images else [text]
    if len(chunks) - 1 > n_images:
        raise DataError(
            f"{len(chunks) - 1} turns hold {IMAGE_TOKEN}; a record has one image, "
            "so keep the placeholder in one turn"
        )
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    spans: list[Span] = [(0, 0)] * len(ids)
    position = 0
    for index, chunk in enumerate(chunks):
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((0, 0))
            position += len(IMAGE_TOKEN)
        chunk_ids, chunk_spans = tokenizer.encode(chunk)
        ids += chunk_ids
        spans += [(begin + position, end + position) for begin, end in chunk_spans]
        position += len(chunk)
    return _masked(ids, spans, segments)


def _masked(ids: list[int], spans: list[Span], segments: Sequence[Segment]) -> Encoded:
    lengths = [len(segment.text) for segment in segments]
    supervised = np.repeat([segment.supervised for segment in segments], lengths)
    before = np.concatenate([[0], np.cumsum(supervised)])  # supervised characters before each
    begin, end = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    input_ids = np.asarray(ids, dtype=np.int64)
    labels = np.where(before[end] > before[begin], input_ids, IGNORE_INDEX)
    return Encoded(torch.from_numpy(input_ids), torch.from_numpy(labels))


def encode_conversation(
    turns: Sequence[tuple[str, str]], has_image: bool, template: Template, tokenizer: Tokenizer
) -> Encoded:
    """Render and tokenise one conversation; DataError where either part refuses it."""
    return tokenize(render(template, turns, has_image), tokenizer, int(has_image))
