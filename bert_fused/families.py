"""The families whose encoder ``fuse`` knows as well: one architecture of Hugging Face under five names."""

# The module of transformers that defines a family -> what the names of its classes begin with.
PREFIXES = {
    f"transformers.models.{family}.modeling_{family}": prefix
    for family, prefix in (
        ("bert", "Bert"),
        ("roberta", "Roberta"),
        ("xlm_roberta", "XLMRoberta"),
        ("camembert", "Camembert"),
        ("electra", "Electra"),
    )
}
