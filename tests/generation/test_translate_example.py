"""examples/translate on a small made-up language, so that it works on a fresh clone."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "translate"
SMALL = [
    *("--width", 32, "--heads", 4, "--layers", 1, "--feed-forward", 64, "--vocab-size", 300),
    *("--batch-tokens", 400, "--warmup", 40, "--peak-rate", 5e-3),
    *("--validate-every", 20, "--checkpoint-every", 20, "--steps", 20),
]
WORDS = dict(
    zip(
        ["the", "a", "red", "big", "dog", "cat", "sees", "hears", "house", "tree"],
        ["der", "ein", "roter", "großer", "hund", "katze", "sieht", "hört", "haus", "baum"],
        strict=True,
    )
)


def write_corpus(folder: Path) -> Path:
    """Sentences of ten words' vocabulary, translated word by word; one side compressed."""
    folder.mkdir()
    pick = random.Random(0)
    for split, count in (("train", 300), ("val", 30), ("test", 30)):
        rows = [[pick.choice(list(WORDS)) for _ in range(pick.randint(2, 6))] for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(" ".join(row) + "\n" for row in rows))
        german = "".join(" ".join(WORDS[word] for word in row) + "\n" for row in rows)
        (folder / f"{split}.de.gz").write_bytes(gzip.compress(german.encode()))
    return folder


class Example:
    """The example's files, imported and run in this process, which has torch loaded already."""

    def load(self, name: str) -> ModuleType:
        return importlib.import_module(name)

    def run(self, script: str, *arguments: object) -> None:
        """`python script.py arguments`; raises what that would tell the user in a line."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            self.load(script).main()


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield Example()
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("translate") / "corpus")


@pytest.fixture(scope="module")
def trained(corpus: Path, example: Example) -> Path:
    """A run of 120 steps, evaluated."""
    out = corpus.parent / "trained"
    example.run("train", "--data", corpus, "--out", out, *SMALL, "--steps", 120)
    example.run("evaluate", "--checkpoint", out / "best.pt", "--data", corpus, "--beams", 2)
    return out


def test_loss_falls_and_translations_begin_to_fit(trained: Path) -> None:
    history = json.loads((trained / "history.json").read_text())
    assert [record["step"] for record in history] == [20, 40, 60, 80, 100, 120]
    assert history[-1]["val_loss"] < 0.5 * history[0]["val_loss"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["sentences"] == 30
    assert sum(group["sentences"] for group in result["by_length"].values()) == 30
    text = (trained / "translations.txt").read_text().split()
    assert set(text) & set(WORDS.values())
    for name in ("loss", "attention_encoder", "attention_decoder", "attention_cross"):
        assert (trained / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    corpus: Path, trained: Path, example: Example
) -> None:
    out = corpus.parent / "resumed"
    common = ("train", "--data", corpus, "--out", out, *SMALL)
    example.run(*common, "--steps", 60)
    # As if it had been killed while it wrote.
    (out / "last.pt.part").write_bytes(b"half")
    example.run(*common, "--steps", 120, "--resume")
    assert_same_run(example, trained, out)


def assert_same_run(example: Example, a: Path, b: Path) -> None:
    load = example.load("checkpoint").load
    whole, parts = load(a / "last.pt"), load(b / "last.pt")
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value), name
    for key, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(parts["optimizer"]["state"][key][name], value), (key, name)
    assert torch.equal(whole["rng"], parts["rng"])
    for ours, theirs in zip(whole["history"], parts["history"], strict=True):
        for name in ("step", "train_loss", "val_loss", "tokens"):
            assert ours[name] == theirs[name], name


@pytest.mark.skipif("MULTI30K" not in os.environ, reason="MULTI30K names no folder of the corpus")
def test_real_sentences(tmp_path: Path, example: Example) -> None:
    """On a part of Multi30k, which is not ours to ship: `train.en` and so on, gzip or not."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, count in (("train", 4000), ("val", 200)):
        pairs = example.load("corpus").read_pairs(Path(os.environ["MULTI30K"]), split, "en", "de")
        for side, rows in (("en", pairs.sources), ("de", pairs.targets)):
            (corpus / f"{split}.{side}").write_text("".join(row + "\n" for row in rows[:count]))
    common = ("train", "--data", corpus, *SMALL, "--vocab-size", 1000, "--batch-tokens", 1000)
    example.run(*common, "--out", tmp_path / "whole", "--steps", 80)
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    losses = [record["val_loss"] for record in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    example.run(*common, "--out", tmp_path / "parts", "--steps", 40)
    example.run(*common, "--out", tmp_path / "parts", "--steps", 80, "--resume")
    assert_same_run(example, tmp_path / "whole", tmp_path / "parts")


def test_translate_keeps_lines_in_order_and_empty_ones_empty(
    trained: Path, example: Example, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def translations(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        example.run("translate", "--checkpoint", trained / "best.pt")
        return capsys.readouterr().out.split("\n")[:-1]

    found = translations("the dog sees a cat\n\na red house\n")
    assert len(found) == 3
    assert found[1] == ""
    assert translations("a red house\n") == found[2:]
    long = " ".join(["house"] * 200)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n{long}\n"))
    example.run("translate", "--checkpoint", trained / "best.pt", "--beams", 1)
    assert "cut to 127 tokens: line 2" in capsys.readouterr().err


def test_report_compares_runs(corpus: Path, trained: Path, example: Example, capsys: Any) -> None:
    runs = [trained]
    for model, backend in (("gru-attention", "fused"), ("gru", "fused"), ("transformer", "torch")):
        out = corpus.parent / f"{model}-{backend}"
        which = ("--model", model, "--backend", backend, "--steps", 20)
        vocabulary = ("--vocabulary", trained / "vocabulary.json")
        example.run("train", "--data", corpus, "--out", out, *SMALL, *which, *vocabulary)
        example.run("evaluate", "--checkpoint", out / "best.pt", "--data", corpus, "--beams", 1)
        runs.append(out)
    report = corpus.parent / "report"
    times = ("--steps-against-length", "--lengths", 4, 8, "--repeats", 1, "--batch-tokens", 16)
    capsys.readouterr()
    example.run("report", *runs, "--out", report, "--loss", 5.0, *times)
    text = capsys.readouterr().out
    for run in runs:
        assert f"| {run.name} |" in text
        assert f"{run.name}: 8 tokens" in text
    assert "| ms per training step at | 4 tokens | 8 tokens |" in (report / "report.md").read_text()
    for name in ("loss", "steps"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_backends_are_compared_seed_by_seed(corpus: Path, example: Example, capsys: Any) -> None:
    common = ("train", "--data", corpus, *SMALL, "--steps", 2, "--clock", "cpu")
    runs = []
    for backend in ("fused", "torch"):
        out = corpus.parent / f"compared-{backend}"
        example.run(*common, "--out", out, "--backend", backend)
        runs.append(out)
    capsys.readouterr()
    example.run("backends", *runs, "--out", corpus.parent)
    text = capsys.readouterr().out
    assert text == (corpus.parent / "backends.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:3]] == ["| 0"]
    error = example.load("errors").UserError
    with pytest.raises(error, match="seed 0 lacks a run with --backend torch"):
        example.run("backends", runs[0])
    example.run(*common, "--out", corpus.parent / "longer", "--steps", 3, "--backend", "torch")
    with pytest.raises(error, match=r"differs from .*compared-fused in more than backend and seed"):
        example.run("backends", runs[0], corpus.parent / "longer")


def test_same_seed_trains_alike_on_both_backends(corpus: Path, example: Example) -> None:
    config, corpus_module = example.load("config"), example.load("corpus")
    vocabulary_module, batches, training = (
        example.load(name) for name in ("vocabulary", "batches", "training")
    )
    pairs = corpus_module.read_pairs(corpus, "train", "en", "de")
    vocabulary = vocabulary_module.Vocabulary.train([*pairs.sources, *pairs.targets], 300)
    losses = []
    for backend in ("fused", "torch"):
        settings = config.Config(
            backend=backend, width=32, layers=1, feed_forward=64, dropout=0.0, batch_tokens=400
        )
        data = batches.Dataset(pairs, vocabulary, settings.max_tokens)
        trainer = training.Trainer(settings, vocabulary, data, data, "cpu")
        losses.append([trainer._one_step() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("model", ["gru", "gru-attention"])
def test_recurrent_models_decode_as_they_train(model: str, example: Example) -> None:
    built = example.load("config").Config(model=model, width=16).build(20).double().eval()
    src = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]])
    tgt = torch.randint(3, 20, (2, 6))
    expected = built(src, tgt)
    torch.testing.assert_close(built(src[1:, :2], tgt[1:]), expected[1:])
    decoding = built.start(src, 6, beams=2)
    doubled = tgt.repeat_interleave(2, dim=0)
    for i in range(6):
        logits = decoding.step(doubled[:, i])
        torch.testing.assert_close(logits, expected[:, i].repeat_interleave(2, dim=0))
        decoding.reorder(torch.tensor([1, 0, 3, 2]))


def test_batches_hold_every_pair_once_and_no_more_tokens_than_asked(
    corpus: Path, example: Example
) -> None:
    pairs = example.load("corpus").read_pairs(corpus, "train", "en", "de")
    vocabulary = example.load("vocabulary").Vocabulary.train(pairs.sources, 300)
    data = example.load("batches").Dataset(pairs, vocabulary, 40)
    assert vocabulary.decode(vocabulary.encode(pairs.targets)) == pairs.targets
    for seed in (None, 0, 1):
        found = data.batches(200, seed)
        assert sorted(i for batch in found for i in batch) == list(range(len(data)))
        for indices in found:
            batch = data.batch(indices)
            assert batch.src.numel() <= 200
            assert batch.tgt[:, 1:].numel() <= 200
    assert data.batches(200, 0) == data.batches(200, 0)
    assert data.batches(200, 0) != data.batches(200, 1)


def test_rate_rises_to_its_peak_and_falls_with_the_root(example: Example) -> None:
    config = example.load("config").Config(warmup=100, peak_rate=1e-3)
    assert config.rate(1) == pytest.approx(1e-5)
    assert config.rate(100) == pytest.approx(1e-3)
    assert config.rate(400) == pytest.approx(5e-4)


def test_a_corpus_that_does_not_fit_is_refused_or_counted(tmp_path: Path, example: Example) -> None:
    read, error = example.load("corpus").read_pairs, example.load("errors").UserError
    with pytest.raises(error, match="is no folder"):
        read(tmp_path / "nowhere", "train", "en", "de")
    (tmp_path / "train.en").write_text("one\ntwo\n\nthree four five\u2028six\n")
    with pytest.raises(error, match=r"must hold train.de or train.de.gz, got train.en"):
        read(tmp_path, "train", "en", "de")
    (tmp_path / "train.de").write_text("eins\nzwei\n")
    with pytest.raises(error, match=r"train.en has 4, .*train.de has 2"):
        read(tmp_path, "train", "en", "de")
    (tmp_path / "train.de").write_text("eins\n \nx\ndrei vier fünf sechs")
    pairs = read(tmp_path, "train", "en", "de")
    assert (len(pairs), pairs.empty) == (2, 2)
    vocabulary = example.load("vocabulary").Vocabulary.train(pairs.sources, 259)
    data = example.load("batches").Dataset(pairs, vocabulary, 10)
    assert (len(data), data.too_long) == (1, 1)
    (tmp_path / "train.de").write_bytes(b"\xff\n\n\n\n")
    with pytest.raises(error, match="must be UTF-8"):
        read(tmp_path, "train", "en", "de")
    (tmp_path / "train.de").unlink()
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"eins\n" * 4)[:-9])
    with pytest.raises(error, match="cannot be read"):
        read(tmp_path, "train", "en", "de")


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, example: Example) -> None:
    checkpoint = example.load("checkpoint")
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    class Power(Exception):
        pass

    def fail(file: Any) -> None:
        file.write(b"half of it")
        raise Power

    with pytest.raises(Power):
        checkpoint.replace_file(path, fail)
    assert checkpoint.load(path)["step"] == 1


def test_unknown_checkpoints_and_vocabularies_are_refused(tmp_path: Path, example: Example) -> None:
    load, error = example.load("checkpoint").load, example.load("errors").UserError
    path = tmp_path / "x.pt"
    with pytest.raises(error, match="there is no checkpoint"):
        load(path)
    path.write_bytes(b"something else")
    with pytest.raises(error, match="is no checkpoint"):
        load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(error, match="is no checkpoint of this program"):
        load(path)
    example.load("checkpoint").save(path, {"model": {"weight": torch.randn(99)}})
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):  # truncated
        path.write_bytes(whole[:length])
        with pytest.raises(error, match="is no checkpoint"):
            load(path)
    vocabulary = example.load("vocabulary").Vocabulary
    with pytest.raises(error, match="holds no vocabulary"):
        vocabulary.from_text("{}", path)
    with pytest.raises(error, match="--vocab-size must be at least 259, got 9"):
        vocabulary.train(["a"], 9)


def test_mistakes_on_the_command_line_are_named(
    corpus: Path, trained: Path, example: Example
) -> None:
    train = ("train", "--data", corpus, "--out")
    fresh = corpus.parent / "fresh"
    for arguments, message in (
        ((*train, trained, *SMALL), "exists: give --resume to go on"),
        ((*train, fresh, *SMALL, "--resume"), "there is no checkpoint"),
        ((*train, fresh, *SMALL, "--heads", 5), "--width 32 must be a multiple of --heads 5"),
        ((*train, trained, *SMALL, "--resume", "--dropout", 0.3), "trained with --dropout 0.2"),
        ((*train, fresh, *SMALL, "--vocabulary", fresh / "no.json"), "there is no vocabulary"),
        (("report", corpus), "run train.py first"),
        (("backends", corpus), "there is no checkpoint"),
    ):
        with pytest.raises(example.load("errors").UserError, match=message):
            example.run(*arguments)


def test_a_corpus_of_long_sentences_alone_is_refused(corpus: Path, example: Example) -> None:
    pairs = example.load("corpus").read_pairs(corpus, "train", "en", "de")
    vocabulary = example.load("vocabulary").Vocabulary.train(pairs.sources, 300)
    data = example.load("batches").Dataset(pairs, vocabulary, 1)
    training, config = example.load("training"), example.load("config").Config(max_tokens=3)
    with pytest.raises(example.load("errors").UserError, match="no training pair is shorter"):
        training.Trainer(config, vocabulary, data, data, "cpu")


def test_a_mistake_ends_the_program_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "train.py"), "--data", tmp_path, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "must hold train.en" in done.stderr
    assert done.stderr.count("\n") == 1
