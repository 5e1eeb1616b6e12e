"""Media and text <-> model input: readers, the tokenizer, chat formats and the processor. No torch."""
