"""Prompt -> token ids, by the `tokenizers` library from the checkpoint's own vocabulary.

The rules are those of CLIP's byte-level BPE as transformers' `CLIPTokenizer` (fast, 4.57 and 5.x) applies
them: NFC, runs of white space to one space, lower case; words, single digits and runs of other signs; bytes
as letters; `</w>` on the last letter of a word. bos, eos and the pad token are recognised where a prompt
spells them out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ritocco.errors import CheckpointError
from ritocco.shown import plain, shown
from ritocco.weight_files import read_json, read_text

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MAX_LENGTH = 77
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_LARGEST_ID = 2**24
_LONGEST_MAX_LENGTH = 1024
_QUOTED_CHARACTERS = 160
_LONGEST_TOKEN = 256
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialToken:
    """A token that is recognised as written, before the text is split into words.

    normalized: compare with the lower-cased text instead of the text as typed; lstrip and rstrip swallow the
    white space beside it; single_word asks for word boundaries. The fields of `tokenizers.AddedToken`.
    """

    content: str
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTables:
    """All that defines a CLIP tokenizer.

    vocab: token -> id; merges: pairs in order of rank; max_length: ids per prompt, bos and eos included.
    pad: fills up to max_length (SD 2 pads with `!`, id 0; SD 1.5 with eos).
    source: where it was read, for messages.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    bos: SpecialToken = SpecialToken(content=BOS)
    eos: SpecialToken = SpecialToken(content=EOS)
    pad: SpecialToken = SpecialToken(content=EOS)
    max_length: int = MAX_LENGTH
    source: str = "tokenizer"


class Tokenizer:
    """CLIP's byte-pair encoding over one vocabulary. Holds no state of a request; safe from several
    threads.
    """

    def __init__(self, tables: TokenizerTables) -> None:
        """Build from tables. Raises CheckpointError where they do not form a CLIP tokenizer."""
        _check_tables(tables)
        self.max_length = tables.max_length
        self.bos_id = tables.vocab[tables.bos.content]
        self.eos_id = tables.vocab[tables.eos.content]
        self.pad_id = tables.vocab[tables.pad.content]
        self.vocab_size = max(tables.vocab.values()) + 1
        # Every character gives a letter or more of some token; up to four of them become one under NFC.
        self._most_characters = 4 * tables.max_length * min(max(map(len, tables.vocab)), _LONGEST_TOKEN)
        self._bpe = _build_bpe(tables)

    @classmethod
    def from_files(
        cls, vocab: Path | str, merges: Path | str, *, pad_token: str = EOS, max_length: int = MAX_LENGTH
    ) -> Tokenizer:
        """Build from a `vocab.json` and a `merges.txt`. Raises CheckpointError for files that are not
        those.
        """
        vocab, merges = Path(vocab), Path(merges)
        return cls(
            TokenizerTables(
                vocab=_vocab_of(read_json(vocab), vocab),
                merges=_merges_of(_merge_lines(read_text(merges)), merges),
                pad=SpecialToken(content=pad_token),
                max_length=max_length,
                source=str(vocab.parent),
            )
        )

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Build from the `tokenizer/` folder of a checkpoint; see `read_tables`."""
        return cls(read_tables(Path(folder)))

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Tokenizer:
        """Build from a transformers `CLIPTokenizer` or `CLIPTokenizerFast` in memory; see `tables_of`."""
        return cls(tables_of(tokenizer))

    def check_fits(self, *, vocabulary: int, positions: int, source: object) -> None:
        """Raises CheckpointError, with the source's name, where a text encoder of that size is another's."""
        if self.vocab_size > vocabulary or self.max_length > positions:
            raise CheckpointError(
                f"{source}: the tokenizer ({self.vocab_size} tokens, {self.max_length} a prompt) does not "
                f"belong to the text encoder ({vocabulary} tokens, {positions} positions)"
            )

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Token ids of prompts.

        Returns ([N, max_length] int64: bos, tokens, eos, padding; notes for the log). A prompt that is too
        long is cut, as the network has only max_length positions, and a note quotes what was cut. A lone
        surrogate (half of a UTF-16 pair, which no Unicode text holds) is read as U+FFFD, and a note says so.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a sequence of prompts, not one string")
        notes: list[str] = []
        clean = [self._readable(_without_surrogates(text, notes)) for text in texts]
        ids = np.full((len(clean), self.max_length), self.pad_id, dtype=np.int64)
        room = self.max_length - 2
        for row, text, encoded in zip(ids, clean, self._encode_all(clean), strict=True):
            kept = encoded.ids[:room]
            row[0] = self.bos_id
            row[1 : 1 + len(kept)] = kept
            row[1 + len(kept)] = self.eos_id
            if len(encoded.ids) > room:
                cut = text[encoded.offsets[room][0] :]
                notes.append(
                    f"prompt cut after {room} tokens, the most this model reads; not used: {_quoted(cut)}"
                )
        return ids, tuple(notes)

    def _readable(self, text: str) -> str:
        """The part of a text that max_length tokens can reach: encoding a megabyte takes seconds."""
        if len(text) > self._most_characters:
            text = _SPACES.sub(" ", text)
        return text[: self._most_characters]

    def _encode_all(self, texts: list[str]) -> list[tokenizers.Encoding]:
        # One at a time: the library's batch call starts a thread pool, which warns in processes that fork
        # later.
        return [self._bpe.encode(text, add_special_tokens=False) for text in texts]


def read_tables(folder: Path) -> TokenizerTables:
    """Read a checkpoint's tokenizer folder without building anything.

    `vocab.json` and `merges.txt`, or the `tokenizer.json` that transformers 5 writes in their place; special
    tokens and `model_max_length` from `tokenizer_config.json` and `special_tokens_map.json` where those
    exist (the map wins unless the config lists its added tokens, as in transformers). Raises
    CheckpointError.
    """
    vocab_file, merges_file, whole_file = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer.json"))
    added: dict[str, Mapping[str, object]] = {}
    if vocab_file.is_file() and merges_file.is_file():
        vocab = _vocab_of(read_json(vocab_file), vocab_file)
        merges = _merges_of(_merge_lines(read_text(merges_file)), merges_file)
    elif whole_file.is_file():
        vocab, merges, added = _read_tokenizer_json(whole_file)
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer here; it needs vocab.json and merges.txt (or tokenizer.json) of the "
            "model"
        )
    config_file, map_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(config_file) if config_file.is_file() else {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        added |= {str(t.get("content")): t for t in decoder.values() if isinstance(t, dict)}
    named = {key: config[key] for key in ("bos_token", "eos_token", "pad_token") if config.get(key)}
    if map_file.is_file() and not isinstance(decoder, dict):
        named |= {key: value for key, value in read_json(map_file).items() if value}
    return TokenizerTables(
        vocab=vocab,
        merges=merges,
        bos=_special(named.get("bos_token", BOS), added, config_file),
        eos=_special(named.get("eos_token", EOS), added, config_file),
        pad=_special(named.get("pad_token", EOS), added, config_file),
        max_length=_max_length(config.get("model_max_length"), config_file),
        source=str(folder),
    )


def tables_of(tokenizer: Any) -> TokenizerTables:
    """Read the tables of a transformers CLIP tokenizer in memory: 5.x and 4.57, slow or fast.

    Raises CheckpointError for a tokenizer of another kind.
    """
    source = f"the pipeline's {type(tokenizer).__name__}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added: dict[str, Mapping[str, object]] = {}
    if backend is not None:
        vocab, merges, added = _parts_of(json.loads(backend.to_str()), source)
    elif hasattr(tokenizer, "encoder") and hasattr(tokenizer, "bpe_ranks"):
        vocab = _vocab_of(dict(tokenizer.encoder), source)
        merges = tuple(sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__))
    else:
        raise CheckpointError(f"{source} is not a CLIP tokenizer with a vocabulary and merges")
    return TokenizerTables(
        vocab=vocab,
        merges=merges,
        bos=_special(str(tokenizer.bos_token), added, source),
        eos=_special(str(tokenizer.eos_token), added, source),
        pad=_special(str(tokenizer.pad_token), added, source),
        max_length=_max_length(tokenizer.model_max_length, source),
        source=source,
    )


def _read_tokenizer_json(
    file: Path,
) -> tuple[dict[str, int], tuple[tuple[str, str], ...], dict[str, Mapping[str, object]]]:
    return _parts_of(read_json(file, limit_bytes=64 << 20), str(file))


def _parts_of(
    whole: Mapping[str, Any], source: str
) -> tuple[dict[str, int], tuple[tuple[str, str], ...], dict[str, Mapping[str, object]]]:
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("end_of_word_suffix") != "</w>":
        raise CheckpointError(f"{source}: not a CLIP tokenizer (a byte-pair encoding with the suffix </w>)")
    pairs = model.get("merges")
    lines = [_joined(pair) for pair in pairs] if isinstance(pairs, list) else None
    added = whole.get("added_tokens") or []
    flags: dict[str, Mapping[str, object]]
    flags = (
        {str(t.get("content")): t for t in added if isinstance(t, dict)} if isinstance(added, list) else {}
    )
    return _vocab_of(model.get("vocab"), source), _merges_of(lines, source), flags


def _joined(pair: object) -> object:
    return " ".join(map(str, pair)) if isinstance(pair, list) else pair


def _vocab_of(value: object, source: Path | str) -> dict[str, int]:
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{source}: the vocabulary is not a JSON object of token -> id")
    for token, number in value.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _LARGEST_ID:
            raise CheckpointError(
                f"{source}: token {shown(token)} has the id {shown(number)}; ids are whole numbers from 0"
            )
    return value


def _merge_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#version")]


def _merges_of(lines: Iterable[object] | None, source: Path | str) -> tuple[tuple[str, str], ...]:
    if lines is None:
        raise CheckpointError(f"{source}: the merges are missing")
    pairs = []
    for number, line in enumerate(lines, start=1):
        parts = line.split() if isinstance(line, str) else []
        if len(parts) != 2:
            raise CheckpointError(
                f"{source}: merge {number} is {shown(line)}; a merge is two tokens with a space between"
            )
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


def _special(value: object, added: Mapping[str, Mapping[str, object]], source: Path | str) -> SpecialToken:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{source}: a special token is {shown(value)}; it must be a text")
    flags: Mapping[str, object] = value if isinstance(value, dict) else added.get(content, {})
    return SpecialToken(
        content=content,
        normalized=flags.get("normalized") is True,
        lstrip=flags.get("lstrip") is True,
        rstrip=flags.get("rstrip") is True,
        single_word=flags.get("single_word") is True,
    )


def _max_length(value: object, source: Path | str) -> int:
    if value is None:
        return MAX_LENGTH
    # transformers writes 10^30 where nobody set a length
    if isinstance(value, int | float) and value > 1e20:
        return MAX_LENGTH
    if not isinstance(value, int) or isinstance(value, bool) or not 2 < value <= _LONGEST_MAX_LENGTH:
        raise CheckpointError(
            f"{source}: model_max_length is {shown(value)}; it must be 3 to {_LONGEST_MAX_LENGTH}"
        )
    return value


def _check_tables(tables: TokenizerTables) -> None:
    for role, token in (("bos", tables.bos), ("eos", tables.eos), ("pad", tables.pad)):
        if token.content not in tables.vocab:
            raise CheckpointError(
                f"{tables.source}: the {role} token {shown(token.content)} is not in the vocabulary"
            )


def _build_bpe(tables: TokenizerTables) -> tokenizers.Tokenizer:
    try:
        bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab=dict(tables.vocab),
                merges=list(tables.merges),
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=tables.eos.content,
            )
        )
    except Exception as error:  # the library raises bare Exception, e.g. for a merge whose result has no id
        raise CheckpointError(
            f"{tables.source}: vocabulary and merges do not fit together ({plain(str(error))})"
        ) from error
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    distinct = {token.content: token for token in (tables.eos, tables.bos, tables.pad)}
    bpe.add_special_tokens(
        [
            tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
            for token in distinct.values()
        ]
    )
    return bpe


def _without_surrogates(text: str, notes: list[str]) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        notes.append("prompt holds half of a UTF-16 surrogate pair, which is no character; read as U+FFFD")
        return "".join("\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
    return text


def _quoted(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _QUOTED_CHARACTERS else text[: _QUOTED_CHARACTERS - 1] + "…")
