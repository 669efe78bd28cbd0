"""``transformers``: packed and slim folders that ``from_pretrained`` reads, and pruning inside its ``Trainer``.

Importing this package does not import ``transformers``; ``callback`` and ``loader`` do.
"""

from pruning_core.integrations.transformers.folder import save_pretrained_sparse as save_pretrained_sparse
