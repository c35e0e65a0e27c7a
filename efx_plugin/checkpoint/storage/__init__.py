"""Files: safetensors, shards and their index, checksums, and directories that appear complete or not at all."""
