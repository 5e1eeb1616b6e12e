"""Text: tokenizers, chat formats, and the reader of text streams."""

from polymodal.modalities.text.chat import CHAT_FORMATS, ChatFormat, Segment, chat_format
from polymodal.modalities.text.reader import TextReader, TextReaderConfig
from polymodal.modalities.text.tokenizer import Tokenizer, TokenStream, train_bpe

__all__ = [
    "CHAT_FORMATS",
    "ChatFormat",
    "Segment",
    "TextReader",
    "TextReaderConfig",
    "TokenStream",
    "Tokenizer",
    "chat_format",
    "train_bpe",
]
