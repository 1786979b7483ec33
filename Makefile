# make demo         from nothing to stories in one step, on a laptop: environment, data, flow, map, mending
# make walkthrough  the whole method in one file of 200 lines, 3.5 minutes on two cores
# make test         ruff and the tests
# make evidence     every model and baseline, measured: hours; stop and repeat it as you like
# make figures      the pictures of the README, from out/palindromes and weights/stories
# make gpu          what one GPU does: tests, benchmark, profile; five minutes
# All install into .venv first, once. ARGS adds settings: make demo ARGS=--max_iters=30

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= out/stories
ARGS ?=
TEXTS ?= 1000
PIP = $(RUN) -m pip install --disable-pip-version-check --no-compile
# Modules are compiled when first imported, not all 10,000 of PyTorch and its friends at once.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo walkthrough test evidence figures gpu clean

demo:
	@date +%s > .demo_start
	@$(MAKE) --no-print-directory $(VENV)/ready
	@if [ -f weights/stories/fmlm.pt ]; then \
		echo; echo "== A network trained for longer, weights/stories, writes:"; \
		$(RUN) sample.py --out_dir=weights/stories --steps=1,4 --gamma=1; fi
	@echo; echo "== Now from nothing. The text to learn from:"
	$(RUN) data/stories/prepare.py
	@echo; echo "== The flow: noise to stories in many steps"
	$(RUN) train.py config/stories.py --out_dir=$(OUT) $(ARGS)
	@echo; echo "== The flow map: the same in one step"
	$(RUN) distill.py config/distill_stories.py --out_dir=$(OUT) $(ARGS)
	@echo; echo "== Its own texts, mended: more of them right after one step"
	$(RUN) distill.py config/mend_stories.py --out_dir=$(OUT) $(ARGS)
	@echo; echo "== How they learned"
	$(RUN) eval/plot.py --out_dir=$(OUT)
	@echo; echo "== What they write"
	$(RUN) sample.py --out_dir=$(OUT) --steps=1,2 --flow_steps=64 --gamma=1 --num_samples=$(TEXTS) | head -n 26
	@echo "demo: $$(( $$(date +%s) - $$(cat .demo_start) )) s from nothing to stories in one step"
	@echo "more: $(RUN) sample.py --out_dir=$(OUT) --num_samples=20"
	@rm .demo_start

walkthrough: $(VENV)/ready
	$(RUN) docs/walkthrough.py

test: $(VENV)/dev
	$(RUN) -m ruff check
	$(RUN) -m pytest -q -rs --durations=5 --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder

evidence: $(VENV)/dev
	$(RUN) eval/evidence.py $(ARGS)

figures: $(VENV)/dev
	$(RUN) docs/figures.py $(ARGS)
	$(RUN) docs/story.py

gpu: $(VENV)/dev
	PYTHON=$(RUN) bash eval/gpu.sh

# Where there is no NVIDIA GPU, PyTorch for CPUs: 0.2 GB to download instead of 3. If its index cannot
# be reached, the second line installs what PyPI has.
$(VENV)/ready: requirements.txt
	@echo "== Installing PyTorch and three more packages into $(VENV): about a minute"
	$(PYTHON) -m venv $(VENV)
	-@command -v nvidia-smi >/dev/null || $(PIP) --no-deps --retries=0 -r $< \
		--extra-index-url=https://download.pytorch.org/whl/cpu
	$(PIP) -r $<
	@touch $@

$(VENV)/dev: $(VENV)/ready requirements-dev.txt
	$(PIP) --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv out .hypothesis .ruff_cache
