"""Qwen 1.5, 2, 2.5, 3 and 3.5, and SmolLM2: tokenizer_config.json of the models named below.

Qwen 3.5 comes with two templates: the larger models think unless they are told not to, the small
ones do not think unless they are told to.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    eos_ids=(151645, 151643),
)
SMOLLM2_TOKENS = ModelTokens(
    {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}, bos="<|im_start|>", eos_ids=(2,)
)
QWEN3_5_TOKENS = ModelTokens(
    {"<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046},
    eos_ids=(248046, 248044),
)


def chatml_with_default(text: str) -> str:
    """Qwen 1.5, 2, 2.5 and SmolLM2: ChatML with a system message where none is given."""
    return (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "{%- else %}\n"
        f"    {{{{- '<|im_start|>system\\n{text}<|im_end|>\\n' }}}}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if not (loop.first and message.role == 'system') %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}\n"
    )


QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' }}
                {{- reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

QWEN3_THINKING = QWEN3.replace(
    """    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}""",
    """    {{- '<|im_start|>assistant\\n<think>\\n' }}""",
)

QWEN3_5_SMALL = r"""{%- macro render_content(content, do_vision_count, is_system_content=false) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {{- raise_exception('Unexpected content type.') }}
    {%- endif %}
{%- endmacro %}
{%- if not messages %}
    {{- raise_exception('No messages provided.') }}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set content = render_content(messages[0].content, false, true)|trim %}
    {{- '<|im_start|>system\n' + content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set content = render_content(message.content, false)|trim %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- if ns.multi_step_tool %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = render_content(message.content, true)|trim %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}
            {{- raise_exception('System message must be at the beginning.') }}
        {%- endif %}
    {%- elif message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set reasoning_content = reasoning_content|trim %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content }}
            {{- '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is true %}
        {{- '<think>\n' }}
    {%- else %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
QWEN3_5 = QWEN3_5_SMALL.replace(
    """ is true %}
        {{- '<think>\\n' }}
    {%- else %}
        {{- '<think>\\n\\n</think>\\n\\n' }}""",
    """ is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}""",
)

PUBLISHED = [
    Published(
        "qwen1.5",
        "Qwen/Qwen1.5-7B-Chat",
        chatml_with_default("You are a helpful assistant"),
        TOKENS,
        "<|im_end|>",
    ),
    Published(
        "qwen2",
        "Qwen/Qwen2-7B-Instruct",
        chatml_with_default("You are a helpful assistant."),
        TOKENS,
        "<|im_end|>",
    ),
    Published(
        "qwen2.5",
        "Qwen/Qwen2.5-7B-Instruct",
        chatml_with_default("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        TOKENS,
        "<|im_end|>",
    ),
    Published(
        "smollm2",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        chatml_with_default("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        SMOLLM2_TOKENS,
        "<|im_end|>",
    ),
    Published("qwen3", "Qwen/Qwen3-8B", QWEN3, TOKENS, "<|im_end|>"),
    Published(
        "qwen3-thinking", "Qwen/Qwen3-30B-A3B-Thinking-2507", QWEN3_THINKING, TOKENS, "<|im_end|>"
    ),
    Published("qwen3-thinking", "Qwen/Qwen3.5-27B", QWEN3_5, QWEN3_5_TOKENS, "<|im_end|>"),
    Published("qwen3_5_nothink", "Qwen/Qwen3.5-0.8B", QWEN3_5_SMALL, QWEN3_5_TOKENS, "<|im_end|>"),
]
