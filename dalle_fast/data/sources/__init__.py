"""The kinds of sources: files in folders and manifests, tar shards, views of other sources, synthetic scenes."""
