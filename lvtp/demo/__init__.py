"""The demonstration behind `lvtp demo`: a photograph, the patches each selector keeps, and what that saves.

Needs the `demo` extra (transformers, matplotlib, Pillow, NumPy); nothing here is imported by `import lvtp`.
"""


class DemoError(Exception):
    """Something the user can put right; the message is one paragraph and says how."""
