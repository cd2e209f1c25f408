"""The scripts, one Lua file an operation; installed as the package `sessiongate.lua`."""
