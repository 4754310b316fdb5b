"""This distribution's version, and its name for pip, which isn't that of the package: `finetune` on PyPI is another
project.
"""

DISTRIBUTION = "finetune-kit"
VERSION = "0.1.0"
