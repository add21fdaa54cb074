# For fingers that are used to make; ./dev has them all.
COMMANDS := serve test e2e lint guests bench package

.PHONY: help $(COMMANDS)
help:
	@./dev help
$(COMMANDS):
	@./dev $@
