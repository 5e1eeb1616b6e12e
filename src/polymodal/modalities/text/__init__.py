"""Text: tokenizers, chat formats, and the reader of text streams."""

from polymodal.modalities.text.chat import Chat, ChatFormat, Run, Segment, tokenize
from polymodal.modalities.text.chat_export import template_of
from polymodal.modalities.text.chat_formats import CHAT_FORMATS, chat_format
from polymodal.modalities.text.chat_template import ChatTemplate
from polymodal.modalities.text.reader import TextReader, TextReaderConfig, TokenizerFiles
from polymodal.modalities.text.tokenizer import Tokenizer, TokenNames, TokenStream
from polymodal.modalities.text.training import train_bpe

__all__ = [
    "CHAT_FORMATS",
    "Chat",
    "ChatFormat",
    "ChatTemplate",
    "Run",
    "Segment",
    "TextReader",
    "TextReaderConfig",
    "TokenNames",
    "TokenStream",
    "Tokenizer",
    "TokenizerFiles",
    "chat_format",
    "template_of",
    "tokenize",
    "train_bpe",
]
