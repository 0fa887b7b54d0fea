"""`llmint8 eval` of an encoder of sentences: its embeddings against those of its source, and the order they make."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor

from llmint8 import converter, runtime
from llmint8.formats import SourceError
from llmint8.runtime.accuracy.embeddings import _ranks, distances
from llmint8.runtime.accuracy.methods import METHODS
from llmint8.runtime.accuracy.pooling import Pooling, read_pooling
from llmint8.runtime.commands.main import main

pytestmark = pytest.mark.usefixtures("quiet_transformers")
VOCABULARY = 97
TEXTS = [" ".join(f"w{(7 * i + j * j) % 90 + 3}" for j in range(3 + i % 4)) for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` in 16 bit, pooled by its first token, and `out` in int8; `text.txt`, with a line twice."""
    folder = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=24, initializer_range=0.3, pad_token_id=1, **sizes
    )
    transformers.BertModel(config).half().save_pretrained(folder / "source")
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder / "source")
    pooled(folder / "source", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    converter.convert(folder / "source", folder / "out", outliers="none")
    (folder / "text.txt").write_text("\n\n".join([*TEXTS, TEXTS[0]]))
    return folder


def pooled(path: Path, config: dict[str, Any], **more: dict[str, Any]) -> Path:
    """Lay the files of a SentenceTransformer beside a model."""
    folders = {"1_Pooling": {"word_embedding_dimension": 32, **config}, **more}
    steps = [{"path": ""}, *({"path": name} for name in folders), {"path": "3_Normalize"}]
    path.mkdir(exist_ok=True)
    (path / "modules.json").write_text(json.dumps(steps))
    for name, content in folders.items():
        (path / name).mkdir(exist_ok=True)
        (path / name / "config.json").write_text(json.dumps(content))
    return path


def run(folder: Path, *options: str, out: str = "out", text: str = "text.txt") -> Result:
    given = ["--reference", str(folder / "source"), "--text", str(folder / text)]
    return CliRunner().invoke(main, ["eval", str(folder / out), *given, *options])


def facts(folder: Path, *options: str) -> dict[str, Any]:
    result = run(folder, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_numbers_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    expected = torch.randn(20, 8)
    other = expected + 0.4 * torch.randn(20, 8)
    itself, found = distances(expected, {"itself": 3 * expected, "other": other})
    assert (itself.cosine_mean, itself.cosine_min) == pytest.approx((1, 1))
    assert (itself.spearman, itself.same_nearest) == (pytest.approx(1), 1)

    def pairs(embeddings: Tensor) -> tuple[Any, Any, Any]:
        values = embeddings.double().numpy()
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        cosines = values @ values.T
        return values, cosines[np.triu_indices(20, 1)], (cosines - 9 * np.eye(20)).argmax(1)

    (p, p_pairs, p_nearest), (q, q_pairs, q_nearest) = pairs(expected), pairs(other)
    same = (p * q).sum(1)
    assert (found.cosine_mean, found.cosine_min) == pytest.approx((same.mean(), same.min()))
    assert found.spearman == pytest.approx(np.corrcoef(p_pairs.argsort().argsort(), q_pairs.argsort().argsort())[0, 1])
    assert found.same_nearest == pytest.approx((p_nearest == q_nearest).mean())
    assert _ranks(torch.tensor([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    with pytest.raises(SourceError, match="not finite"):
        distances(expected / 0, {})


def test_the_command_compares_what_each_text_gives_alone(folder: Path) -> None:
    """Whatever is batched: one text at a time, and the first token of each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
    source = transformers.BertModel.from_pretrained(folder / "source", dtype=torch.float32).eval()
    models = (source, runtime.load(folder / "out", dtype=torch.float32))
    with torch.no_grad():
        embedded = [
            torch.cat([model(**tokenizer(text, return_tensors="pt")).last_hidden_state[:, 0] for text in TEXTS])
            for model in models
        ]
    (expected,) = distances(embedded[0], {"": embedded[1]})
    found = facts(folder)
    (ours,) = found["embeddings"]
    assert ours["name"].startswith("out: static, ")
    assert (found["texts"], found["tokens"], found["pooling"]) == (12, sum(len(t.split()) for t in TEXTS), ["cls"])
    assert found["layers"] == 13
    # Of an input between two int8 values either may be taken, where sums are in another order.
    assert 1 - ours["cosine_mean"] == pytest.approx(1 - expected.cosine_mean, rel=0.02)
    assert 1 - ours["cosine_min"] == pytest.approx(1 - expected.cosine_min, rel=0.05)
    assert ours["spearman"] == pytest.approx(expected.spearman, abs=1e-3)
    assert not (folder / "out" / "llmint8_eval.json").exists()


def test_the_table(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0, result.output
    head, ours, empty, note = result.stdout.splitlines()
    assert head.split() == ["1", "-", "cosine", "largest", "Spearman", "same", "nearest"]
    row = facts(folder)["embeddings"][0]
    numbers = [f"{1 - row['cosine_mean']:.6f}", f"{1 - row['cosine_min']:.6f}", f"{row['spearman']:.5f}"]
    assert ours.split()[-4:] == [*numbers, f"{row['same_nearest']:.2%}"]
    assert empty == ""
    assert note == (
        "12 texts of 54 tokens together, pooled by cls. 13 layers in int8, 0.00% of their columns stored unquantized."
    )


def test_methods_and_other_modes_stand_beside_it(folder: Path) -> None:
    off = {row["name"]: 1 - row["cosine_mean"] for row in facts(folder, "--methods")["embeddings"]}
    names = [method.name for method in METHODS]
    assert list(off)[: len(names)] == names
    (absmax,) = (name for name in off if name.startswith("out: static, absmax"))
    assert list(off)[-1] == "out: dynamic 6.0, absmax"
    assert off[absmax] == pytest.approx(off["absmax vector-wise"], rel=0.05)
    assert off["absmax"] > 1.2 * off["absmax vector-wise"] > 0
    assert off["zeropoint vector-wise"] > 0


def test_a_text_is_cut_and_the_file_is_used_in_whole_lines(folder: Path) -> None:
    assert facts(folder, "--window", "3")["tokens"] == 36
    found = facts(folder, "--tokens", "16")
    assert (found["texts"], found["tokens"]) == (3, 12)
    result = run(folder, "--tokens", "11")
    assert result.exit_code == 1
    assert result.stderr == "Error: the text has 2 lines within 11 tokens, at least 3 texts are needed\n"


def test_pooling_is_what_the_files_beside_the_model_say(tmp_path: Path) -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 2, 3, 4, 5])[:, None] / 15
    mean, first = hidden.mean(1), hidden[:, 0]
    configs: list[tuple[dict[str, Any], Tensor]] = [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, mean),
        ({"pooling_mode_cls_token": True}, first),
        ({"pooling_mode_max_tokens": True}, hidden.amax(1)),
        ({"pooling_mode_lasttoken": True}, hidden[:, -1]),
        ({"pooling_mode_weightedmean_tokens": True}, (hidden * weights).sum(1)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, mean),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, torch.cat([first, mean], 1)),
        ({"pooling_mode": "cls"}, first),
        ({"pooling_mode": ["mean", "cls"]}, torch.cat([mean, first], 1)),
    ]
    for config, expected in configs:
        assert torch.allclose(read_pooling(pooled(tmp_path, config))(hidden), expected, atol=1e-6), config
    pooled(tmp_path, {"pooling_mode": "cls"}, **{"2_Dense": {"in_features": 32}})
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert read_pooling(tmp_path) == Pooling(("cls",), 128, ("2_Dense",))
    for length in (0, -1, None, "128"):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        assert read_pooling(tmp_path).longest is None
    with pytest.raises(SourceError, match=r"1_Pooling/config.json: pooling_mode is 'median', known are cls, max, "):
        read_pooling(pooled(tmp_path, {"pooling_mode": "median"}))
    assert read_pooling(folder_without(tmp_path)) == Pooling(("mean",))


def folder_without(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    return tmp_path / "plain"


def test_what_is_neither_is_refused(folder: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    transformers.ViTModel(config).half().save_pretrained(tmp_path / "vit")
    converter.convert(tmp_path / "vit", tmp_path / "vit8", outliers="none")
    arguments = [str(tmp_path / "vit8"), "--reference", str(tmp_path / "vit"), "--text", str(folder / "text.txt")]
    result = CliRunner().invoke(main, ["eval", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
