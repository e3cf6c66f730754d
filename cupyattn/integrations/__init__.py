"""Other libraries' own ways of calling: `jax` inside its transformations, `torch` inside its compiler and models.

Nothing here is imported by `import cupyattn`: each is imported by who asks for it, and imports its library.
"""
