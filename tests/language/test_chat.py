"""Chat templates against transformers' rendering, training weights, and streamed text."""

import dataclasses
import itertools
import types

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers.utils.chat_template_utils import render_jinja_template

from fusion_jax.errors import UserError
from fusion_jax.language.answers import PLAIN
from fusion_jax.language.ask import Assistant
from fusion_jax.language.chat import Chat, text_stream
from fusion_jax.language.fused import Layout

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{% endfor %}"""
WRITTEN_FOR_TRANSFORMERS = """{% for message in messages %}
    {%- if loop.index0 == 1 and messages | length == 3 %}{% continue %}{% endif %}
    {{- message | tojson }}{{ {'a': 1} | tojson(indent=2) }}
    {%- generation %}{{ message['content'] }}{% endgeneration %}
{% endfor %}"""
TURNS = [
    {"role": "user", "content": "Who? "},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why\n\n<b>?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, and the marks of turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA, WRITTEN_FOR_TRANSFORMERS])
def test_renders_as_transformers(tokenizer, template):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = Chat(tokenizer, template, special, ())
    for answer, count in itertools.product((True, False), (1, 2, 3)):
        expected, _ = render_jinja_template(
            [TURNS[:count]], chat_template=template, add_generation_prompt=answer, **special
        )
        assert chat.render(TURNS[:count], answer=answer) == expected[0]


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer, adds):
    """With <s> where the tokenizer adds one: a model without turns expects it."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.add_special_tokens([AddedToken("<s>")])
    begin = own.token_to_id("<s>")
    if adds:
        own.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", begin)])
    config = {"bos_token_id": begin, "eos_token_id": 1}
    checkpoint = types.SimpleNamespace(tokenizer=own, config=config, chat_template=None)
    chat = Chat.of(checkpoint)
    asked = [{"role": "user", "content": "Who?"}]
    found = Assistant(None, {}, chat).ids(asked, {})
    assert found == own.encode("Who?").ids and (found[0] == begin) == adds
    plain = dataclasses.replace(chat, template=PLAIN).prompt(asked)
    assert plain == own.encode("Who?\n").ids


def test_only_what_the_assistant_says_has_weight(tokenizer):
    chat = Chat(tokenizer, CHATML, {}, ())
    layout = Layout({"image": -1}, {"image": 2}, {"image": 1})
    turns = [{"role": "user", "content": "<image>Who?"}, TURNS[1], TURNS[2]]
    turns.append({"role": "assistant", "content": "So."})
    ids, weights = chat.training(turns, layout)
    answered = [i for i, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(answered, skip_special_tokens=False) == "Me.<|im_end|>So.<|im_end|>"
    assert ids.count(-1) == 2
    whole = chat.encode(chat.render(turns, answer=False).rstrip(), layout)
    assert ids == whole
    prompt = chat.prompt(turns[:1], layout)
    assert ids[: len(prompt)] == prompt


def test_templates_cannot_escape_and_fail_clearly(tokenizer):
    for template, message in (
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for %}", "template"),
        (LLAMA, "roles must alternate"),
        ("{{ messages[9].content + 1 }}", "template"),
        ("{{ 'a'.index('b') }}", "template"),
        (None, "no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            Chat(tokenizer, template, {"bos_token": ""}, ()).render(TURNS[1:])


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("Ünïcödé 猫 ok", (), "Ünïcödé 猫 ok"),
        ("one. two. three", (". t",), "one"),
        ("ababac", ("abac", "zz"), "ab"),
        ("almost #", ("###",), "almost #"),
        ("one two", ("",), "one two"),
    ],
)
def test_streamed_text(tokenizer, text, stops, shown, size):
    """In any pieces: no half characters, nothing of a stop string."""
    ids = tokenizer.encode(text).ids
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    pieces = list(text_stream(tokenizer, chunks, stops))
    assert "".join(pieces) == shown
    assert all("\ufffd" not in piece for piece in pieces)
    if size == 1 and not stops:
        assert len(pieces) > 5
