"""Pipelines of transformers run a loaded int8 model as they run any other."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from llmint8 import converter, runtime

pytestmark = pytest.mark.usefixtures("quiet_transformers")
TEXTS = ["w3 w14 w15 w92", "w6 w5"]
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def loaded(path: Path, model: Any) -> Any:
    model.half().save_pretrained(path / "source")
    converter.convert(path / "source", path / "out", outliers="none")
    found = runtime.load(path / "out", dtype=torch.float32)
    assert any(isinstance(module, runtime.Int8Linear) for module in found.modules())
    return found


def test_text_generation(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, eos_token_id=2, bos_token_id=None)
    model = loaded(tmp_path, transformers.LlamaForCausalLM(config))
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipeline(TEXTS, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for text, (answer,) in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert answer["generated_text"].split() == tokenizer.decode(expected[0, ids.shape[1] :]).split()
        assert answer["generated_text"]


def test_text_classification(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"})
    model = loaded(tmp_path, transformers.BertForSequenceClassification(config))
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, answers in zip(TEXTS, pipeline(TEXTS), strict=True):
        with torch.no_grad():
            expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].softmax(0)
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert [scores[label] for label in ("bad", "fair", "good")] == pytest.approx(expected.tolist(), rel=1e-4)


def test_feature_extraction(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = loaded(tmp_path, transformers.BertModel(transformers.BertConfig(**SIZES)))
    pipeline = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for text, found in zip(TEXTS, pipeline(TEXTS, return_tensors=True), strict=True):
        with torch.no_grad():
            expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state
        assert torch.allclose(found, expected, atol=1e-5)
