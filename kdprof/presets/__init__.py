"""Studies that ship with kdprof, one TOML file each."""
