"""The program: its subcommands, and how what goes wrong becomes an exit code.

0    done
1    it could not be done here: no compiler, no GPU, not enough memory, an unsafe kernel cache, a request that failed inside, a bug (with traceback)
2    the input: a bad option, checkpoint, prompt or value; one sentence on stderr
130  interrupted
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

import nanoserve
from nanoserve.cli.bench import bench
from nanoserve.cli.chat import chat
from nanoserve.cli.doctor import doctor
from nanoserve.cli.explain import explain
from nanoserve.cli.generate import generate
from nanoserve.cli.plan import plan
from nanoserve.cli.serve import serve
from nanoserve.cli.terminal import say, tolerate_encodings


class ErrorBoundary(TyperGroup):
    """Around every command: an error a user can act on becomes a sentence, and only a bug becomes a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):
            raise  # with a broken pipe, whoever read the output has seen enough: typer ends quietly
        except UnicodeDecodeError as error:
            say(f"error: the input is not UTF-8: {error.reason} at byte {error.start}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say("\ninterrupted")
            raise typer.Exit(130) from error
        except ValueError as error:  # CheckpointError and RequestRefused are ValueErrors
            say(f"error: {error}")
            raise typer.Exit(2) from error
        except (
            ImportError,
            OSError,
            MemoryError,
        ) as error:  # a broken installation, no compiler, a full disk or GPU
            say(f"error: {error}")
            raise typer.Exit(1) from error
        except RuntimeError as error:
            from nanoserve.compiler.gpu.cubin import AssemblerMissing
            from nanoserve.compiler.gpu.triton_kernel import TritonMissing
            from nanoserve.compiler.jit import CompileError
            from nanoserve.compiler.object_cache import CacheRefused
            from nanoserve.cuda.same_bits import OtherBits
            from nanoserve.kernels.cuda.library import KernelMissing
            from nanoserve.native import CudaDriverMissing, CudaError

            known = (
                AssemblerMissing, CacheRefused, CompileError, CudaDriverMissing, CudaError, KernelMissing, OtherBits, TritonMissing,
            )  # fmt: skip
            if not isinstance(error, known):
                raise
            say(f"error: {error}")
            raise typer.Exit(1) from error


def _as_help(function: Callable[..., Any]) -> str:
    """A docstring for --help: a paragraph becomes one line, which the terminal's width breaks; examples keep their lines."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return escape(
        "\n\n".join(text if text.startswith("Examples:") else text.replace("\n", " ") for text in paragraphs)
    )


app = typer.Typer(
    name="nanoserve",
    cls=ErrorBoundary,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, panel in ((generate, "Run a model"), (chat, "Run a model"), (serve, "Run a model"), (bench, "Look inside"), (plan, "Look inside"), (explain, "Look inside"),
                       (doctor, "Look inside")):  # fmt: skip
    app.command(rich_help_panel=panel, help=_as_help(command))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nanoserve {nanoserve.__version__}")
        raise typer.Exit


def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Serve a language model from this machine's CPU or a GPU: complete prompts, chat, see what fits, see how it is compiled.

    MODEL is a directory with config.json and safetensors, or the name of a Hugging Face hub repository (org/name), which is
    downloaded once. Supported families: GPT-2, Llama, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3, OLMo2, Granite, Gemma 2 and 3.

    Examples:
      nanoserve doctor                     can this machine serve?
      nanoserve plan Qwen/Qwen3-0.6B       what does it need?
      nanoserve chat Qwen/Qwen3-0.6B
      nanoserve serve Qwen/Qwen3-0.6B      at http://127.0.0.1:8000, as OpenAI's API
      nanoserve generate models/tiny-gpt -p "def main" --temperature 0
    """
    tolerate_encodings()


app.callback(help=_as_help(program))(program)


def main() -> None:
    """The entry point `nanoserve`."""
    app(prog_name="nanoserve")
