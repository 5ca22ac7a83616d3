"""The final answer is extracted from a model's output, without reasoning and marks."""

import pytest

from adaptkit.data.conversation import read_example
from adaptkit.data.encoding import IGNORED, Encoder
from adaptkit.data.tokenizer_files import load_tokenizer
from adaptkit.training.evaluation.final import Marks

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
TEMPLATES = {
    "none": None,
    "no thoughts": TURNS + "\n{{ m.content }}" + END + "\n{% endif %}",
    "channels": (  # gpt-oss
        TURNS + "{% if m.role == 'assistant' %}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
        "<|im_start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}" + END + "{% endif %}"
    ),
    "a channel": (  # as gpt-oss's, but without reasoning
        TURNS + "{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}" + END + "{% endif %}"
    ),
    "sections": (  # one token closes both reasoning and answers: Kimi K3
        TURNS + "<|message|>{% if m.role == 'assistant' %}{{ m.reasoning_content }}<|end|>think<|channel|>response"
        "<|message|>{% endif %}{{ m.content }}{{ '<|end|>response' if m.role == 'assistant' }}" + END
        + "<|message|>{% endif %}"
    ),
    "empty thoughts": (  # Qwen3
        TURNS + "\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}" + END + "\n{% endif %}"
    ),
    "thoughts begun": (  # DeepSeek R1, which omits reasoning from rendered answers
        TURNS + "\n{{ m.content.split('</think>')[-1] }}" + END + "\n<think>\n{% endif %}"
    ),
    "own marks": (  # Seed-OSS
        TURNS + "\n{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}"
        "{{ m.content }}" + END + "\n{% endif %}"
    ),
    "words": (  # functionary
        TURNS + "\n{{ 'all\n' if m.role == 'assistant' }}{{ m.content }}" + END + "\n{% endif %}"
    ),
}  # fmt: skip
OF_THOUGHTS = "it ends with </think> there"
ANSWERS = ("the Rhine", "all rivers", "final", "response: the Po\n\nand more", "x</y> [z]")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_is_extracted_from_the_learned_tokens(name, llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATES[name]
    marks, encoder = Marks.of(tokenizer), Encoder(tokenizer)
    for answer in (*ANSWERS, *([] if name == "thoughts begun" else [OF_THOUGHTS])):
        for thoughts in ("final thoughts\nare long", *([] if name == "thoughts begun" else [""])):
            message = {"role": "assistant", "content": answer, "reasoning_content": thoughts}
            example = read_example({"messages": [{"role": "user", "content": "Name it"}, message]}, "here")
            ((encoded,),) = [one.samples for one in encoder.encode([("here", example)])]
            tokens = [label for label in encoded.labels if label != IGNORED]
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            assert marks.answer_in(tokens, tokenizer) == answer


@pytest.mark.parametrize("name", ["none", "no thoughts", "thoughts begun"])
def test_reasoning_that_the_template_does_not_render_is_not_part_of_an_answer(name, llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = TEMPLATES[name]
    tokens = tokenizer(f"<think>\nhm, long\n</think>\n\n{OF_THOUGHTS}")["input_ids"]
    assert Marks.of(tokenizer).answer_in(tokens, tokenizer) == OF_THOUGHTS
