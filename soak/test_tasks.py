"""`llmint8 eval --tasks` with lm-evaluation-harness itself, on a task of our own: no data set is fetched.

It is here because of the harness' size: 600 MB with what it needs, and it reads twelve thousand files before it begins.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result

from llmint8 import converter
from llmint8.runtime.commands.main import main

pytest.importorskip("lm_eval")

VOCABULARY, QUESTIONS = 97, 60
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: brier_score}}]
"""
PERPLEXITY = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` and `out`, and in `tasks/` two YAML files and questions to which the model knows no answer."""
    folder = tmp_path_factory.mktemp("tasks")
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15}
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    model.save_pretrained(folder / "source")  # in float32: in 16 bit the harness' likelihoods have ties
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "source")
    converter.convert(folder / "source", folder / "out", outliers="none")
    (folder / "tasks").mkdir()
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(2, VOCABULARY, (QUESTIONS, 8), generator=generator).tolist()
    rows = [
        {"question": " ".join(f"w{i}" for i in ids[:4]), "choices": [f"w{i}" for i in ids[4:]], "answer": number % 4}
        for number, ids in enumerate(words)
    ]
    file = folder / "tasks" / "words.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "words.yaml").write_text(TASK.format(file=file))
    (folder / "tasks" / "texts.yaml").write_text(PERPLEXITY.format(file=file))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it has read of a JSON file; and reaches nobody."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def run(folder: Path, tasks: str, *options: str) -> Result:
    given = [str(folder / "out"), "--reference", str(folder / "source"), "--tasks", tasks, *options]
    return CliRunner().invoke(main, ["eval", *given])


def likeliest(model: Any, row: dict[str, Any]) -> int:
    ids = [[int(word[1:]) for word in text.split()] for text in (row["question"], *row["choices"])]
    with torch.no_grad():
        logits = model(torch.tensor(ids[:1])).logits[0, -1]
    return int(torch.stack([logits[choice] for (choice,) in ids[1:]]).argmax())


def test_both_models_stand_side_by_side(folder: Path) -> None:
    from llmint8 import runtime

    result = run(folder, f"{folder / 'tasks' / 'words.yaml'}", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    acc, brier = json.loads(result.stdout)["tasks"]
    assert (acc["task"], acc["metric"], brier["metric"]) == ("words", "acc", "brier_score")
    assert (acc["questions"], acc["shots"], acc["higher_is_better"]) == (QUESTIONS, 0, True)

    rows = list(map(json.loads, (folder / "tasks" / "words.jsonl").read_text().splitlines()))
    source = transformers.LlamaForCausalLM.from_pretrained(folder / "source").eval()
    right = [
        [float(likeliest(model, row) == row["answer"]) for row in rows]
        for model in (source, runtime.load(folder / "out"))
    ]
    for name, scores in zip(("reference", "int8"), map(torch.tensor, right), strict=True):
        assert acc[name] == pytest.approx(float(scores.mean()))
        assert acc[f"{name}_stderr"] == pytest.approx(float(scores.std()) / math.sqrt(QUESTIONS))
    differences = torch.tensor(right[1]) - torch.tensor(right[0])
    assert acc["difference"] == pytest.approx(float(differences.mean()))
    assert acc["difference_stderr"] == pytest.approx(float(differences.std()) / math.sqrt(QUESTIONS))
    assert brier["difference"] == brier["int8"] - brier["reference"] != 0
    assert brier["difference_stderr"] is None  # no mean of what each question scores


def test_the_table_of_tasks_by_name_from_a_directory(folder: Path) -> None:
    given = ("--include-path", str(folder / "tasks"), "--limit", "10", "--num-fewshot", "1")
    result = run(folder, "word?,texts", *given)
    assert result.exit_code == 0, result.output
    head, *rows, empty, note = result.stdout.splitlines()
    assert head.split() == ["task", "metric", "questions", "16", "bit", "int8", "difference"]
    assert [row.split()[:3] for row in rows] == [
        ["words", "acc", "10"],
        ["words", "brier_score", "10"],
        ["texts", "word_perplexity", "10"],
    ]
    assert rows[0].count(" ± ") == 3
    assert empty == ""
    assert "the first 10 questions of each task" in note


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("nonsense", ["nonsense: lm-evaluation-harness has no such task", "--include-path DIR"]),
        ("gone.yaml", ["gone.yaml: no such file"]),
        ("paper", ["winogrande: its data set is not in the cache, and not to be had"]),
    ],
)
def test_errors_are_one_line(tasks: str, words: list[str], folder: Path) -> None:
    result = run(folder, tasks)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_an_encoder_has_no_tasks(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).half().save_pretrained(
        tmp_path / "b"
    )
    converter.convert(tmp_path / "b", tmp_path / "b8", outliers="none")
    result = CliRunner().invoke(
        main, ["eval", str(tmp_path / "b8"), "--reference", str(tmp_path / "b"), "--tasks", "x"]
    )
    assert (
        result.stderr == f"Error: {tmp_path / 'b'}: BertModel predicts no next token, which the harness' tasks need\n"
    )
