"""The archives the small world is made of, pinned by version and hash."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One pinned archive: `key` is our name for it, `sha256` the hash of the whole file."""

    key: str
    registry: str
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        """Name of the archive in the cache; versions are part of it, so upgrades do not collide."""
        ending = {"npm": "tgz", "pypi": "whl", "debian": "deb"}[self.registry]
        return f"{self.key}-{self.version.replace(':', '_')}.{ending}"


PACKAGES = (
    Package(
        "noto",
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    Package(
        "flat",
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    Package(
        "3d",
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    Package(
        "emojibase",
        "npm",
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
    ),
    Package(
        "flags",
        "npm",
        "svg-country-flags",
        "1.2.10",
        "2576650b4568c8ee1a2a6ddaa45c0246be16735f229bb40b1a0a6f40424e5213",
        "public domain",
    ),
    Package(
        "countries",
        "npm",
        "world-countries",
        "5.1.0",
        "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
        "ODbL-1.0",
    ),
    Package(
        "clipart",
        "debian",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "public domain",
    ),
    Package(
        "wordnet",
        "debian",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet 3.0 licence",
    ),
    Package(
        "easyvqa",
        "pypi",
        "easy-vqa",
        "1.0",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "MIT",
    ),
    Package(
        "animals",
        "pypi",
        "animal-mnist",
        "0.4",
        "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
        "MIT",
    ),
    Package(
        "elements",
        "pypi",
        "mendeleev",
        "1.3.0",
        "76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c",
        "MIT",
    ),
)
