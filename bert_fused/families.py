"""The families of Hugging Face's models whose encoders can be fused: one architecture under five names."""

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
