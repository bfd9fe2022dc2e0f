"""Token ids against transformers' CLIPTokenizer on the same vocabulary, on prompts chosen to be awkward."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ritocco.errors import CheckpointError
from ritocco.prompt import Tokenizer, TokenizerTables, read_tables, tables_of

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
AWKWARD = [
    "",
    "   ",
    "a yellow cat face on a park bench",
    "Face!! of a CAT! ! !wow",
    "<|endoftext|> cat <|startoftext|> on<|endoftext|>a bench",
    "a <|ENDOFTEXT|> cat",
    "  doubled   spaces  ",
    "lines\nand\ttabs\r\nand\rmore \u2028 \u0085 \x0b\x0c",
    "cat's they're WE'VE I'm she'd he'll don''t 'sss ’s",
    "2024 12cats 3.14 1,000 \u2167 \u00bd \u0663",
    "naïve cafe\u0301 e\u0301 \u1e9b\u0323 a\u0300\u0301\u0302",
    "\U0001f600 a \U0001f469\u200d\U0001f469\u200d\U0001f467 cat \U0001f431\U0001f431",
    "猫の顔 face 黄色い猫",
    "&lt;b&gt; cat &amp;amp; dog &nbsp; &#39;",
    "a\u200bb\u00a0c\u3000d \ufeffbom",
    "\x07bell\x1b[0m cat\x7f",
    "\x00nul a\x00b",
    "ÀÉÎ ß İstanbul ﬁ ŒÆ ΑΣΣ",
    "a-b_c --- ... “quoted” (((nested))) [x:1.2]",
    "\ufdfa \U0001d54f مرحبا नमस्ते שלום ไทย",
    "x" * 300,
    "cat " * 74,
    "cat " * 75,
    "cat " * 76,
    "the quick brown dogs " * 60,
]
if version("transformers").startswith("4."):
    # 5.x finds end tokens that a prompt spells in capitals, and so do we; 4.57 does so in some folders only.
    AWKWARD.remove("a <|ENDOFTEXT|> cat")


def _fast_class() -> Any:
    """CLIPTokenizerFast: in 5.x another name of CLIPTokenizer, in 4.57 the class with the same rules."""
    transformers: Any = import_module("transformers")
    return transformers.CLIPTokenizerFast


def _reference_ids(folder: Path, prompts: list[str], **options: Any) -> list[list[int]]:
    tokenizer = _fast_class().from_pretrained(folder, **options)
    encoded = tokenizer(prompts, padding="max_length", max_length=77, truncation=True)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _sd15_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_checkpoint / "tokenizer", folder)
    (folder / "special_tokens_map.json").unlink()
    return folder


@pytest.mark.parametrize("prompt", AWKWARD, ids=lambda prompt: ascii(prompt[:20]))
def test_ids_equal_transformers(tiny_checkpoint: Path, prompt: str) -> None:
    folder = tiny_checkpoint / "tokenizer"
    ids, _ = Tokenizer.from_folder(folder).encode([prompt])
    assert ids.dtype == np.int64
    assert ids.tolist() == _reference_ids(folder, [prompt])


def test_sd15_pads_with_eos_and_sd2_with_exclamation_mark(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sd15 = _sd15_folder(tiny_checkpoint, tmp_path)
    ids, _ = Tokenizer.from_folder(sd15).encode(AWKWARD)
    assert ids.tolist() == _reference_ids(sd15, AWKWARD)
    eos = read_tables(sd15).vocab[EOS]
    assert ids[0, 1:].tolist() == [eos] * 76
    sd2, _ = Tokenizer.from_folder(tiny_checkpoint / "tokenizer").encode([""])
    assert sd2[0, 1:].tolist() == [eos] + [0] * 75


@pytest.mark.parametrize("pad", [EOS, "!"])
@pytest.mark.parametrize("normalized", [True, False])
def test_special_tokens_written_as_objects(
    tiny_checkpoint: Path, tmp_path: Path, normalized: bool, pad: str
) -> None:
    folder = _sd15_folder(tiny_checkpoint, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    for key, content in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS)):
        config[key] = {"__type": "AddedToken", "content": content, **flags}
    config["pad_token"] = pad
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids, _ = Tokenizer.from_folder(folder).encode(AWKWARD)
    assert ids.tolist() == _reference_ids(folder, AWKWARD)


def test_folder_that_transformers_5_wrote(tiny_checkpoint: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    _fast_class().from_pretrained(tiny_checkpoint / "tokenizer").save_pretrained(written)
    for name in ("vocab.json", "merges.txt"):
        (written / name).unlink(missing_ok=True)
    again, _ = Tokenizer.from_folder(written).encode(AWKWARD)
    assert again.tolist() == _reference_ids(tiny_checkpoint / "tokenizer", AWKWARD)


def test_tokenizer_in_memory(tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "tokenizer"
    ids, _ = Tokenizer.from_transformers(_fast_class().from_pretrained(folder)).encode(AWKWARD)
    assert ids.tolist() == _reference_ids(folder, AWKWARD)


def test_slow_tokenizer_in_memory(tiny_checkpoint: Path) -> None:
    """transformers 4.57's slow class has no backend, but an encoder and ranks."""
    tables = read_tables(tiny_checkpoint / "tokenizer")

    slow = SimpleNamespace(
        encoder=dict(tables.vocab),
        bpe_ranks={pair: rank for rank, pair in enumerate(tables.merges)},
        bos_token=BOS,
        eos_token=EOS,
        pad_token="!",
        model_max_length=77,
    )
    ids, _ = Tokenizer(tables_of(slow)).encode(AWKWARD)
    assert ids.tolist() == _reference_ids(tiny_checkpoint / "tokenizer", AWKWARD)


def test_from_files(tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "tokenizer"
    tokenizer = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", pad_token="!")
    ids, _ = tokenizer.encode(["cat", "dog"])
    assert ids.tolist() == _reference_ids(folder, ["cat", "dog"])
    assert tokenizer.encode([])[0].shape == (0, 77)


def test_a_prompt_that_is_cut_says_what_was_cut(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint / "tokenizer")
    _, fits = tokenizer.encode(["cat " * 75])
    assert fits == ()
    ids, notes = tokenizer.encode(["cat " * 75 + "bench Face", "cat"])
    assert ids[0, -1] == tokenizer.eos_id
    assert len(notes) == 1
    assert "75 tokens" in notes[0]
    assert "'bench Face'" in notes[0]
    _, long = tokenizer.encode(["cat " * 5000])
    assert len(long[0]) < 400


def test_half_a_surrogate_pair_is_read_as_replacement_character(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint / "tokenizer")
    ids, notes = tokenizer.encode(["cat \ud83d face"])
    assert ids.tolist() == tokenizer.encode(["cat \ufffd face"])[0].tolist()
    assert "surrogate" in notes[0]


def test_one_string_is_refused(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint / "tokenizer")
    with pytest.raises(TypeError, match="sequence of prompts"):
        tokenizer.encode("cat")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", "[1, 2]", "object"),
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", '{"a": -1}', "ids are whole numbers"),
        ("vocab.json", '{"a": "b"}', "ids are whole numbers"),
        ("vocab.json", '{"a": 1}', "do not fit|not in the vocabulary"),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("merges.txt", "#version: 0.2\na b c\n", "merge 1"),
        ("merges.txt", "#version: 0.2\nq zzz\n", "do not fit"),
        ("tokenizer_config.json", '{"model_max_length": 1e9}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": 1000000}', "model_max_length"),
        ("special_tokens_map.json", '{"pad_token": 7}', "special token"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "'<pad>' is not in the vocabulary"),
    ],
)
def test_damaged_files_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: str, content: str, said: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_checkpoint / "tokenizer", folder)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        tables_of(object())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        read_tables(tmp_path)


def test_tables_without_a_special_token() -> None:
    with pytest.raises(CheckpointError, match="bos token"):
        Tokenizer(TokenizerTables(vocab={"a": 0}, merges=()))


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, "cat " * 250_000, " " * 10**6 + "cat", "\u0301" * 10**6, "7" * 10**6],
    ids=["word", "words", "spaces", "marks", "digits"],
)
def test_a_megabyte_reads_like_its_beginning(tiny_checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint / "tokenizer")
    ids, notes = tokenizer.encode([text])
    assert len(tokenizer._readable(text)) < 100_000
    start = text.lstrip()[:5000]
    np.testing.assert_array_equal(ids, tokenizer.encode([start])[0])
    assert len(notes) == (len(start) > 3)
