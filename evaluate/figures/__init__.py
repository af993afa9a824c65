"""The CytoSyn report's figures of generated tiles (arXiv 2603.18089), from synthetic datasets."""
