"""The chat formats by name."""

from __future__ import annotations

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.modalities.text.chat import Chat, ChatFormat, Turn
from polymodal.modalities.text.chat_template import ChatTemplate
from polymodal.modalities.text.tokenizer import END, START


def _turns() -> ChatFormat:
    end = "<|end|>"
    return ChatFormat(
        name="turns",
        controls=("<|system|>", "<|user|>", "<|assistant|>", end),
        system=Turn(before=("<|system|>",)),
        user=Turn(before=("<|user|>",)),
        assistant=Turn(before=("<|assistant|>",), after=(end,)),
        end=end,
    )


def _plain(name: str, *, media_first: bool = False) -> ChatFormat:
    """Texts one after another as language models without chat training read them (GPT-2, OPT)."""
    return ChatFormat(
        name=name,
        media_first=media_first,
        controls=(END,),
        start=(START,),
        system=Turn(),
        user=Turn(),
        assistant=Turn(after=(END,)),
        end=END,
    )


def _chatml(name: str, default_system: str = "") -> ChatFormat:
    start, end = "<|im_start|>", "<|im_end|>"
    return ChatFormat(
        name=name,
        controls=(start, end),
        system=Turn(before=(start, "system\n"), after=(end, "\n")),
        user=Turn(before=(start, "user\n"), after=(end, "\n")),
        assistant=Turn(before=(start, "assistant\n"), after=(end, "\n")),
        default_system=default_system,
        end=end,
    )


def _vicuna() -> ChatFormat:
    return ChatFormat(
        name="vicuna",
        controls=("</s>",),
        start=(START,),
        system=Turn(after=(" ",)),
        user=Turn(before=("USER: ",), after=(" ",)),
        assistant=Turn(before=("ASSISTANT:",), gap=" ", after=("</s>",)),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        ),
        end="</s>",
    )


def _minigpt4() -> ChatFormat:
    """MiniGPT-4 (2304.10592 section 3.2, with the system turn and marks of its code); the end token is added."""
    return ChatFormat(
        name="minigpt-4",
        controls=(END,),
        start=(START,),
        system=Turn(after=("###",)),
        user=Turn(before=("Human: ",), after=("###",)),
        assistant=Turn(before=("Assistant:",), gap=" ", after=("###", END)),
        media=Turn(before=("<Img>",), after=("</Img> ",)),
        default_system=(
            "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it "
            "to you. Please answer my questions."
        ),
        end=END,
    )


def _llama_2() -> ChatFormat:
    """Llama 2 chat (2307.09288 appendix A.3.3): the system turn stands inside the first user turn."""
    return ChatFormat(
        name="llama-2",
        controls=("<s>", "</s>"),
        system=Turn(before=("<s>", "[INST] <<SYS>>\n"), after=("\n<</SYS>>\n\n",)),
        user=Turn(before=("<s>", "[INST] "), after=(" [/INST]",)),
        user_after_system=Turn(after=(" [/INST]",)),
        assistant=Turn(gap=" ", after=(" ", "</s>")),
        end="</s>",
    )


def _mistral() -> ChatFormat:
    """Mistral instruct (2310.06825 section 4), as its first tokenizers spell it; a system turn opens the first turn."""
    return ChatFormat(
        name="mistral",
        controls=("<s>", "</s>"),
        start=("<s>",),
        system=Turn(before=("[INST] ",), after=("\n\n",)),
        user=Turn(before=("[INST] ",), after=(" [/INST]",)),
        user_after_system=Turn(after=(" [/INST]",)),
        assistant=Turn(gap=" ", after=("</s>",)),
        end="</s>",
    )


def _asked_and_answered(name: str, first: str, last: str, opening: str, *, media_first: bool = False) -> ChatFormat:
    """A question to an encoder and an answer by a decoder (T5, BLIP's question answering)."""
    return ChatFormat(
        name=name,
        media_first=media_first,
        controls=tuple(dict.fromkeys(item for item in (first, last, opening) if item)),
        system=Turn(after=("\n",)),
        user=Turn(before=(first,) if first else (), after=(last,)),
        assistant=Turn(before=(opening,), after=(last,)),
        end=last,
    )


def _blip() -> ChatFormat:
    """A caption, after the words that a request gives it to begin with (2201.12086 section 3.1)."""
    return ChatFormat(
        name="blip",
        controls=("[DEC]", "[SEP]"),
        start=("[DEC]",),
        system=Turn(),
        user=Turn(),
        assistant=Turn(after=("[SEP]",)),
        end="[SEP]",
    )


def _whisper(name: str, *told: str) -> ChatFormat:
    """What Whisper's decoder is told before it writes down what it hears (2212.04356 section 2.3)."""
    before = ("<|startoftranscript|>", *told, "<|notimestamps|>")
    end = "<|endoftext|>"
    return ChatFormat(
        name=name,
        controls=(*before, end),
        system=Turn(),
        user=Turn(),
        assistant=Turn(before=before, after=(end,)),
        end=end,
    )


CHAT_FORMATS = {
    chat.name: chat
    for chat in (
        _turns(),
        _plain("none"),
        _plain("blip-2", media_first=True),
        _chatml("chatml"),
        _chatml("qwen", "You are a helpful assistant."),
        _vicuna(),
        _minigpt4(),
        _llama_2(),
        _mistral(),
        _whisper("whisper", "<|en|>", "<|transcribe|>"),
        _whisper("whisper.en"),
        _asked_and_answered("t5", "", "</s>", "<pad>"),
        _asked_and_answered("blip-2-t5", "", "</s>", "<pad>", media_first=True),
        _blip(),
        _asked_and_answered("blip-vqa", "[CLS]", "[SEP]", "[DEC]"),
    )
}
"""The known formats by name. ``turns`` has one control token per role and is the choice for models from scratch."""


def chat_format(chat: str | ChatTemplate) -> Chat:
    """The format called ``chat``; a checkpoint's own template is one itself.

    Raises:
        ConfigError: if there is none of that name.
    """
    if isinstance(chat, ChatTemplate):
        return chat
    if chat not in CHAT_FORMATS:
        raise ConfigError(unknown("chat format", chat, CHAT_FORMATS))
    return CHAT_FORMATS[chat]
