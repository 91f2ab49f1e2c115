# Every target is a script; run one with --help, or read its first lines, for what it does.
.PHONY: help run test bench lint lab clean
.DEFAULT_GOAL := help

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: ## Boot a stock Linux guest: a shell on a terminal, a self-check otherwise
	@resources/run

test: ## Everything that can be tested, on hardware KVM or in the lab
	@tests/run

bench: ## Measure Hull against its floor, Firecracker and QEMU microvm
	@tests/run-bench $(ARGS)

lint: ## Formatting, clippy and shellcheck
	@tests/run-lint

lab: ## A shell in the lab, or one command: make lab CMD='dmesg'
	@resources/setup guest lab
	@if [ -n "$$CMD" ]; then tests/lab/lab run $(ARGS) -- sh -c "$$CMD"; else tests/lab/lab shell $(ARGS); fi

clean: ## Remove what was built and downloaded
	rm -rf .cache target tests/payload/target
# The command reaches the shell as it was typed: no expansion of its dollars by make.
override CMD := $(value CMD)
export CMD
