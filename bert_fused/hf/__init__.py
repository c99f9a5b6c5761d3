"""Put the fused modules into models of Hugging Face and take them out again. Needs transformers."""
