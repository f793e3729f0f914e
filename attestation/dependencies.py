"""What may run in an enclave beside Python, by name. Measured by :mod:`attestation.process_image`, and all that
:mod:`enclave.imports` lets an enclave's processes import; it imports nothing itself.
"""

ENCLAVE_DEPENDENCIES = {
    "botocore": ("botocore",),
    "cbor2": ("cbor2",),
    "cffi": ("cffi", "_cffi_backend"),
    "cryptography": ("cryptography",),
    "diskcache": ("diskcache",),
    "jinja2": ("jinja2",),
    "jmespath": ("jmespath",),
    "llama-cpp-python": ("llama_cpp",),
    "markupsafe": ("markupsafe",),
    "numpy": ("numpy",),
    "pyasn1": ("pyasn1",),
    "pycparser": ("pycparser",),
    "python-dateutil": ("dateutil",),
    "six": ("six",),
    "typing-extensions": ("typing_extensions",),
    "urllib3": ("urllib3",),
}
"""The enclave's trusted computing base beside Python: what ``enclave`` imports, closed under what that requires, each
with the names by which it is imported. The one list of it."""

APPLICATION_PACKAGES = ("attestation", "enclave", "vsockrpc")

STANDARD_LIBRARY_SKIPPED = frozenset({"test", "tests", "idlelib"})
"""Folders of the standard library, at any depth, that are not measured: no enclave imports them."""
