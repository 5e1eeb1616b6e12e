"""Chat formats as Jinja templates, so that other libraries and servers lay conversations out as we do."""

from __future__ import annotations

import json

from polymodal.modalities.text.chat import Chat, ChatFormat, Turn
from polymodal.modalities.text.chat_template import ChatTemplate
from polymodal.modalities.text.tokenizer import END, START, Tokenizer


def template_of(chat: Chat, tokenizer: Tokenizer) -> str | None:
    """The Jinja template that renders what ``chat`` renders, for conversations of text.

    Where the tokenizer names a placeholder of media, contents may be lists of parts as well, as processors of several
    modalities write them; every part that is no text becomes one placeholder.

    Args:
        chat: a format, or a template; one that knows of no media is given contents with the placeholders in their
            places, anything else is returned as it is.
        tokenizer: whose own start and end token the template spells out.

    Returns:
        The template; None for formats of neither kind.
    """
    if isinstance(chat, ChatTemplate):
        is_of_text = tokenizer.names.media is not None and not chat.marks
        return _taking_parts(chat.template, tokenizer) if is_of_text else chat.template
    if not isinstance(chat, ChatFormat):
        return None
    names = {id: name for name, id in tokenizer.controls.items()}
    spelled = {
        START: "".join(names.get(id, "") for id in tokenizer.prefix),
        END: "" if tokenizer.eos_id is None else names.get(tokenizer.eos_id, ""),
    }

    def literal(items: tuple[str, ...]) -> str:
        return "{{ " + json.dumps("".join(spelled.get(item, item) for item in items)) + " }}" if items else ""

    said = "{{ message['content'] }}"
    if tokenizer.names.media is not None:
        part = "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + literal((tokenizer.names.media,))
        parts = f"{{% for part in message['content'] %}}{part}{{% endif %}}{{% endfor %}}"
        said = f"{{% if message['content'] is string %}}{said}{{% else %}}{parts}{{% endif %}}"

    def turn(shape: Turn, content: str = said) -> str:
        return literal((*shape.before, shape.gap)) + content + literal(shape.after)

    user = turn(chat.user)
    if chat.user_after_system is not None:
        follows = "not loop.first and messages[loop.index0 - 1]['role'] == 'system'"
        user = f"{{% if {follows} %}}{turn(chat.user_after_system)}{{% else %}}{user}{{% endif %}}"
    default = ""
    if chat.default_system:
        system = turn(chat.system, "{{ " + json.dumps(chat.default_system) + " }}")
        default = f"{{% if not messages or messages[0]['role'] != 'system' %}}{system}{{% endif %}}"
    return (
        literal(chat.start)
        + default
        + "{% for message in messages %}"
        + f"{{% if message['role'] == 'system' %}}{turn(chat.system)}"
        + f"{{% elif message['role'] == 'user' %}}{user}"
        + f"{{% else %}}{turn(chat.assistant)}{{% endif %}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{literal(chat.assistant.before)}{{% endif %}}"
    )


def _taking_parts(template: str, tokenizer: Tokenizer) -> str:
    """A template of string contents that takes lists of parts as well: they are joined before it begins."""
    joined = (
        "{%- set whole = namespace(messages=[]) %}{%- for message in messages %}"
        "{%- if message['content'] is not string %}{%- set said = namespace(text='') %}"
        "{%- for part in message['content'] %}"
        "{%- set said.text = said.text + (part['text'] if part['type'] == 'text' else MEDIA) %}{%- endfor %}"
        "{%- set message = dict(message, content=said.text) %}{%- endif %}"
        "{%- set whole.messages = whole.messages + [message] %}{%- endfor %}{%- set messages = whole.messages %}"
    )
    return joined.replace("MEDIA", json.dumps(tokenizer.names.media)) + template
