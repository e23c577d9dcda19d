"""The network of the paper's section 3, its anchors and its post-processing."""
