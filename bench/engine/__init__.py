"""``make bench-engine``: our engine through the whole attested path against llama.cpp's own servers, in one run, with
the same model file, threads, KV type and compile flags. See bench/README.md.
"""
