"""The spawner: protocol.h describes its protocol, bin/ holds the program that the build makes."""
