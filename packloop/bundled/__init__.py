"""The tiny Llama, the instruction data and the score that the package carries, so that the whole job runs offline."""
