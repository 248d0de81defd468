"""The pool: candidate samples of one LLaVA JSON or JSON-lines file, memory-mapped.

Opening a pool reads the file once and keeps offsets and a few bytes per sample, never the records:
they are decoded again where they are needed. `row` is the position in the file; `uid` is a hash of
id, image reference and conversations, so it does not depend on the position.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from llava.errors import DataError, UsageError
from llava.records import Record, decode_record, find_records, line_number, map_file, parse_record

MAX_RECORD_BYTES = 16 * 2**20
MAX_TURNS = 10_000
_PLAIN_BYTES = 10**5  # larger records are checked one by one
_ROLES = ["human", "gpt"] * 100
_MASK = 2**64 - 1
_CHUNK_BYTES = 2**18  # decoded at a time; 4 MiB costs 1.6 times as much (fresh pages)


class _Sample(Record, gc=False):
    """A record with the keys that may name its source."""

    source: Any = None
    dataset: Any = None
    meta: Any = None

    @property
    def named_source(self) -> Any:
        if isinstance(self.meta, dict):
            return self.source or self.dataset or self.meta.get("source")
        return self.source or self.dataset


_SAMPLE = msgspec.json.Decoder(_Sample)
_SAMPLES = msgspec.json.Decoder(list[_Sample])
_encode = msgspec.json.Encoder().encode


def source_of(record: Record, named: Any = None) -> str:
    """The data set a record comes from.

    `named` is what the record itself says (key `source`, `dataset` or `meta.source`). Without it,
    the LLaVA-1.5 mixture is told apart by image folder and, within COCO, the wording of the first
    question (VQAv2 and OKVQA cannot be told apart); other images by their first folder.
    """
    if isinstance(named, str) and named:
        return named
    if record.image is None:
        return "sharegpt"
    folder, slash, _ = record.image.partition("/")
    if not slash or not folder:
        return "unknown"
    if folder != "coco":
        return {"ocr_vqa": "ocrvqa", "textvqa": "textcaps"}.get(folder, folder)
    text = record.first_human
    if "option's letter" in text:
        return "aokvqa"
    if "bounding box coordinate" in text or "short description for this region" in text:
        return "refcoco"
    return "vqav2+okvqa" if "single word or phrase" in text else "llava_instruct"


@dataclass
class Pool:
    """N samples of a file. Row-wise arrays are aligned with the file.

    `uids` (N, 16) uint8; `has_image` (N,) bool; `source_codes` (N,) int32 into `source_names`;
    `bad` maps rows that violate the schema to the reason: they cannot be scored or selected;
    `duplicate_ids` counts samples whose id an earlier one has (1 and "1" differ). `images` and
    `image_roots` say where the pictures are; they are no part of what the pool is.
    """

    path: Path
    sha256: str
    uids: np.ndarray
    has_image: np.ndarray
    source_codes: np.ndarray
    source_names: tuple[str, ...]
    bad: dict[int, str]
    duplicate_ids: int
    starts: np.ndarray = field(repr=False)
    ends: np.ndarray = field(repr=False)
    _content: Any = field(repr=False, compare=False)
    limit: int | None = None
    images: str | None = None
    image_roots: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        path: str | Path,
        limit: int | None = None,
        images: str | Path | None = None,
        image_roots: Sequence[str | Path] = (),
    ) -> Pool:
        """Read the first `limit` (default: all) samples of a JSON list or JSON-lines file.

        `images` is the folder that the records' `image` paths are relative to, `image_roots` are
        further folders that links inside it may lead to.

        Raises UsageError when there is no such file or `limit` is no positive number, DataError
        when it is not a pool, is empty, or holds no usable record.
        """
        path = Path(path)
        if limit is not None and limit < 1:
            raise UsageError(f"limit {limit}: give a positive number of records")
        if not path.exists():
            raise UsageError(f"{path}: no such pool file: check --pool")
        content = map_file(path)
        with ThreadPoolExecutor(1) as executor:  # hashing runs beside the parser
            digest = executor.submit(lambda: hashlib.sha256(content).hexdigest())
            starts, ends, is_list = find_records(content, path, "conversations")
            index = _Index(content, path, starts[:limit], ends[:limit], is_list)
        return cls(
            path=path,
            sha256=digest.result(),
            uids=np.frombuffer(bytes(index.uids), np.uint8).reshape(-1, 16),
            has_image=np.frombuffer(bytes(index.has_image), bool),
            source_codes=np.frombuffer(index.codes, np.int32),
            source_names=tuple(index.names),
            bad=index.bad,
            duplicate_ids=len(index.ids) - len(np.unique(np.array(index.ids, np.uint64))),
            starts=starts[:limit],
            ends=ends[:limit],
            _content=content,
            limit=limit,
            images=None if images is None else str(images),
            image_roots=tuple(map(str, image_roots)),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        pictures, sources = int(self.has_image.sum()), len(self.source_names)
        return f"<Pool {self.path}: {len(self)} samples, {pictures} with images, {sources} sources>"

    def raw(self, row: int) -> bytes:
        """The record exactly as it stands in the file."""
        return self._content[self.starts[row] : self.ends[row]]

    def record(self, row: int) -> Record:
        """The decoded record; raises DataError for a row in `bad`."""
        if row in self.bad:
            raise DataError(f"{self.path}: row {row}: {self.bad[row]}")
        return decode_record(self.raw(row), f"{self.path}: row {row}")

    def id(self, row: int) -> Any:
        """The record's own `id` (opaque, may repeat); None where there is none."""
        if self.ends[row] - self.starts[row] > MAX_RECORD_BYTES:
            return None
        try:
            return msgspec.json.decode(self.raw(row), type=_Id).id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def uid(self, row: int) -> str:
        """32 hexadecimal digits."""
        return self.uids[row].tobytes().hex()

    @property
    def sources(self) -> np.ndarray:
        """Source name of every sample, (N,) str; rows in `bad` have "unknown"."""
        return np.array(self.source_names)[self.source_codes]

    def digest(self, rows: np.ndarray | None = None) -> str:
        """xxh3-128 hex of the contents of `rows` (default: all), in that order."""
        uids = self.uids if rows is None else self.uids[rows]
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(uids))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": None}  # a process that is spawned maps the file again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _content=map_file(state["path"]))


class _Id(msgspec.Struct):
    id: Any = None


class _Index:
    """One pass over the records that collects the row-wise facts of a pool."""

    def __init__(self, content, path: Path, starts, ends, is_list: bool) -> None:
        self.uids, self.has_image = bytearray(), bytearray()
        self.codes, self.ids = array("i"), array("Q")
        self.names: dict[str, int] = {}
        self.bad: dict[int, str] = {}
        self._content, self._path, self._is_list = content, path, is_list
        cuts = np.searchsorted(ends, np.arange(starts[0], ends[-1], _CHUNK_BYTES))
        for first, last in itertools.pairwise(np.unique([0, *cuts, len(starts)]).tolist()):
            self._add_chunk(first, starts[first:last], ends[first:last])
        if len(self.bad) == len(starts):
            row, reason = next(iter(self.bad.items()))
            raise DataError(f"{path}: no record is usable; row {row}: {reason}")

    def _add_chunk(self, first: int, starts: np.ndarray, ends: np.ndarray) -> None:
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        samples = self._decode_together(starts, ends)
        if samples is None:  # find out which record it is
            samples = [self._decode(row, *span) for row, span in enumerate(spans, first)]
        names, digest = self.names, xxhash.xxh3_128_digest
        keys = [
            _encode((s.id, s.image, s.conversations)) if s else memoryview(self._content)[a:b]
            for s, (a, b) in zip(samples, spans, strict=True)
        ]
        sources = [source_of(s, s.named_source) if s else "unknown" for s in samples]
        self.uids += b"".join(map(digest, keys))
        self.has_image += bytes([s is not None and s.image is not None for s in samples])
        self.codes.extend([names.setdefault(source, len(names)) for source in sources])
        self.ids.extend([hash(repr(s.id)) & _MASK for s in samples if s and s.id is not None])

    def _decode_together(self, starts: np.ndarray, ends: np.ndarray) -> list[_Sample] | None:
        """All records in one call; None when one of them is, or may be, unusable."""
        if (ends - starts).max() > _PLAIN_BYTES:
            return None
        together = self._content[starts[0] : ends[-1]]
        try:
            if self._is_list:
                samples = _SAMPLES.decode(b"[" + together + b"]")
            else:
                samples = _SAMPLE.decode_lines(together)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        sound = len(samples) == len(starts) and all(map(_alternates, samples))
        return samples if sound else None

    def _decode(self, row: int, start: int, end: int) -> _Sample | None:
        """The record, or None and the reason in `bad`; DataError where a line is not JSON."""
        raw = self._content[start : min(end, start + MAX_RECORD_BYTES + 1)]
        if len(raw) > MAX_RECORD_BYTES:
            self.bad[row] = f"{end - start} bytes, more than {MAX_RECORD_BYTES}; split it"
            return None
        try:
            n_turns = len(parse_record(raw).conversations)
        except DataError as error:
            self._refuse_torn_line(raw, start)
            self.bad[row] = str(error)
            return None
        if n_turns > MAX_TURNS:
            self.bad[row] = f"{n_turns} turns, more than {MAX_TURNS}; split it"
            return None
        return _SAMPLE.decode(raw)

    def _refuse_torn_line(self, raw: bytes, start: int) -> None:
        try:
            if not self._is_list:
                msgspec.json.decode(raw, type=msgspec.Raw)
        except (msgspec.MsgspecError, RecursionError) as error:
            line = line_number(self._content, start)
            raise DataError(
                f"{self._path}: line {line}: not JSON ({error}): correct or remove this line"
            ) from error


def _alternates(record: Record) -> bool:
    """The common case, in which `parse_record` has nothing to object to."""
    roles = [turn.from_ for turn in record.conversations]
    return roles == _ROLES[: len(roles)] != []
