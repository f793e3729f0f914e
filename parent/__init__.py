"""The untrusted host: proxy, model store, launchers. It conveys bytes and is believed in nothing."""
