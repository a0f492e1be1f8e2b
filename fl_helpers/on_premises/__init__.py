"""Where older kits look for `cross_silo/on_premises`: it says what to do, no more."""

raise ImportError(
    "this kit was hardened by an older version of fl_helpers: its local/ folder names "
    "fl_helpers.on_premises, which is fl_helpers.cross_silo.on_premises now. Harden it "
    "again with site.harden_site, the server's with site.harden_server: "
    "docs/on-premises.md, Operations, A new version"
)
