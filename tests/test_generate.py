"""`stream_chat`: the text arrives in pieces, the numbers are right, errors come through."""

from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from llmint8.runtime.model import compiled
from llmint8.runtime.model.generate import Generation, statistics, stream_chat

WORDS = {f"w{i}": i for i in range(97)}
CHAT = "{% for m in messages %}w7 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8 w9{% endif %}"


@pytest.fixture
def tokenizer() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", unk_token="w0")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, initializer_range=0.5, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # the length is then what was asked for
    return model


def test_pieces_make_up_the_greedy_text(model: Any, tokenizer: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=40)  # greedy all the same
    pieces: list[str] = []
    done = stream_chat(model, tokenizer, "w3 w4 w5", pieces.append, max_new_tokens=12)
    prompt = torch.tensor([[3, 4, 5]])
    tokens = prompt
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert "".join(pieces) == done.text == tokenizer.decode(tokens[0, 3:], skip_special_tokens=True)
    assert len(pieces) > 3
    assert "" not in pieces
    assert (done.prompt_tokens, done.new_tokens) == (3, 12)
    assert done.seconds > 0


def test_chat_template_is_used_unless_told_not_to(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    chat = stream_chat(model, tokenizer, "w3 w4 w5", lambda text: None, max_new_tokens=5)
    assert chat.prompt_tokens == 6
    by_hand = stream_chat(
        model, tokenizer, "w7 w3 w4 w5 w8 w9", lambda text: None, max_new_tokens=5, chat_template=False
    )
    assert (by_hand.prompt_tokens, by_hand.text) == (6, chat.text)


def test_temperature_draws(model: Any, tokenizer: Any) -> None:
    texts = set()
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        texts.add(stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=20, temperature=1.5).text)
    assert len(texts) == 3


def test_stops_at_the_end_token(model: Any, tokenizer: Any) -> None:
    first = stream_chat(model, tokenizer, "w3 w4", lambda text: None, max_new_tokens=1).text
    model.generation_config.eos_token_id = WORDS[first]
    assert stream_chat(model, tokenizer, "w3 w4", lambda text: None, max_new_tokens=9).new_tokens == 1


def test_encoder_decoder_counts_its_own_tokens(tokenizer: Any) -> None:
    torch.manual_seed(1)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=97, **sizes)).eval()
    model.generation_config.update(eos_token_id=None, decoder_start_token_id=0)
    done = stream_chat(model, tokenizer, "w3 w4 w5 w6", lambda text: None, max_new_tokens=5)
    assert (done.prompt_tokens, done.new_tokens) == (4, 5)


def test_errors_come_through(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        stream_chat(model, tokenizer, "w3", fail, max_new_tokens=4)
    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(OSError, match="broken pipe"):
        stream_chat(model, tokenizer, "w3", lambda text: None, max_new_tokens=4)


def test_invalid_arguments(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        stream_chat(model, tokenizer, "w3", lambda text: None, temperature=-1.0)
    with pytest.raises(ValueError, match="prompt is '  '"):
        stream_chat(model, tokenizer, "  ", lambda text: None)


def test_statistics_leave_the_compilation_out_of_the_speed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Generation("w1", prompt_tokens=7, new_tokens=5, token_seconds=[0.5, 30.0, 40.0, 40.25, 40.5])
    first, speed = "First token    0.50 s, after 7 tokens of prompt", "Then           4.0 tokens per second, 5 in all"
    assert statistics(model, done)[:2] == [first, speed]
    monkeypatch.setattr(compiled, "_cpp_compiler", lambda: "g++")
    assert compiled.compile_decode(model)
    assert statistics(model, done)[:3] == [first, "Compilation    39.5 s, with two more tokens", speed]
    assert statistics(model, done)[3:] == statistics(model, done)[-1:]
    assert statistics(model, done)[-1].startswith("Memory         ")
    short = Generation("w1", prompt_tokens=7, new_tokens=2, token_seconds=[0.5, 30.0])
    assert [line.split()[0] for line in statistics(model, short)] == ["First", "Memory"]


def test_statistics_on_a_gpu_have_the_peak_of_its_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(device=torch.device("cuda:1"), generation_config=model.generation_config)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9 * (1 + device.index))
    done = Generation("w1", prompt_tokens=7, new_tokens=1, token_seconds=[0.5])
    assert "GPU memory     2.00 GB at most" in statistics(there, done)


def test_statistics_follow_from_a_generation(model: Any, tokenizer: Any) -> None:
    done = stream_chat(model, tokenizer, "w3 w4 w5", lambda text: None, max_new_tokens=6)
    assert len(done.token_seconds) == 6
    assert done.token_seconds == sorted(done.token_seconds)
    assert [line.split()[0] for line in statistics(model, done)] == ["First", "Then", "Memory"]
