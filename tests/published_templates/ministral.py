"""Ministral 3: chat_template.jinja of the models named below.

The default system message is that of the model of 3 billion parameters; the larger ones name
themselves, and are derived. mlc_llm renders the same.
"""

from __future__ import annotations

import json

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {
        "<s>": 1,
        "</s>": 2,
        "[INST]": 3,
        "[/INST]": 4,
        "[AVAILABLE_TOOLS]": 5,
        "[/AVAILABLE_TOOLS]": 6,
        "[TOOL_RESULTS]": 7,
        "[/TOOL_RESULTS]": 8,
        "[TOOL_CALLS]": 9,
        "[SYSTEM_PROMPT]": 17,
        "[/SYSTEM_PROMPT]": 18,
    },
    bos="<s>",
    eos_ids=(2,),
    opens_with_bos=True,
)

INSTRUCT = """\
You are Ministral-3-3B-Instruct-2512, a Large Language Model (LLM) created by Mistral AI, a \
French startup headquartered in Paris.
You power an AI assistant called Le Chat.
Your knowledge base was last updated on 2023-10-01.
The current date is {today}.

When you're not sure about some information or when the user's request requires up-to-date or \
specific data, you must use the available tools to fetch the information. Do not hesitate to use\
 tools whenever they can provide a more accurate or complete response. If no relevant tools are \
available, then clearly state that you don't have the information and avoid making up anything.
If the user's question is not clear, ambiguous, or does not provide enough context for you to \
accurately answer the question, you do not try to answer it right away and you rather ask the \
user to clarify their request (e.g. "What are some good restaurants around me?" => "Where are \
you?" or "When is the next flight to Tokyo" => "Where do you travel from?").
You are always very attentive to dates, in particular you try to resolve dates (e.g. "yesterday"\
 is {yesterday}) and when asked about information at specific dates, you discard information \
that is at another date.
You follow these instructions in all languages, and always respond to the user in the language \
they use or request.
Next sections describe the capabilities that you have.

# WEB BROWSING INSTRUCTIONS

You cannot perform any web search or access internet to open URLs, links etc. If it seems like \
the user is expecting you to do so, you clarify the situation and ask the user to copy paste the\
 text directly in the chat.

# MULTI-MODAL INSTRUCTIONS

You have the ability to read images, but you cannot generate images. You also cannot transcribe \
audio files or videos.
You cannot read nor transcribe audio files or videos.

# TOOL CALLING INSTRUCTIONS

You may have access to tools that you can use to fetch information or perform actions. You must \
use these tools in the following situations:

1. When the request requires up-to-date information.
2. When the request requires specific data that you do not have in your knowledge base.
3. When the request involves actions that you cannot perform without tools.

Always prioritize using tools to provide the most accurate and helpful response. If tools are \
not available, inform the user that you cannot perform the requested action at the moment."""

REASONING = """\
# HOW YOU SHOULD THINK AND ANSWER

First draft your thinking process (inner monologue) until you arrive at a response. Format your \
response using Markdown, and use LaTeX for any mathematical equations. Write both your thoughts \
and the response in the same language as the input.

Your thinking process must follow the template below:[THINK]Your thoughts or/and draft, like \
working through an exercise on scratch paper. Be as casual and as long as you want until you are\
 confident to generate the response to the user.[/THINK]Here, provide a self-contained response."""


def ministral_3(default_system_message: str) -> str:
    return (
        f"{{%- set default_system_message = {json.dumps(default_system_message)} %}}\n"
        r"""{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' -}}
    {{- messages[0]['content'] -}}
    {{- '[/SYSTEM_PROMPT]' -}}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
    {%- if default_system_message != '' %}
        {{- '[SYSTEM_PROMPT]' + default_system_message + '[/SYSTEM_PROMPT]' }}
    {%- endif %}
{%- endif %}
{%- if tools is defined and tools is not none and tools|length > 0 %}
    {{- '[AVAILABLE_TOOLS]' + (tools| tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role == 'user' or message.role == 'assistant' %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('conversation roles must alternate user and assistant roles') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] }}
        {{- eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS]' + message['content']|string + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool roles are supported') }}
    {%- endif %}
{%- endfor %}
"""
    )


PUBLISHED = [
    Published(
        "ministral3",
        "mistralai/Ministral-3-3B-Instruct-2512",
        ministral_3(INSTRUCT),
        TOKENS,
        "</s>",
    ),
    Published(
        "ministral3_reasoning",
        "mistralai/Ministral-3-3B-Reasoning-2512",
        ministral_3(REASONING),
        TOKENS,
        "</s>",
    ),
]
