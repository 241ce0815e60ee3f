"""Completion scripts, written from the argument parser so that they cannot fall behind it."""

from __future__ import annotations

import argparse
from typing import Any


def completion(arguments: argparse.Namespace) -> int:
    """Print the script of one shell."""
    from narrows.cli.commands import print_json
    from narrows.cli.parser import build_parser

    commands = read_commands(build_parser())
    script = {"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](commands)
    if arguments.json:
        print_json({"shell": arguments.shell, "script": script})
    else:
        print(script, end="")
    return 0


def read_commands(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return per command its summary and its options, each with help and choices."""
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in subparsers.choices.values():
        command.complete()
    summaries = {a.dest: a.help or "" for a in subparsers._choices_actions}
    return {
        name: {
            "summary": summaries[name],
            "options": [
                (o, a.help or "")
                for a in command._actions
                for o in a.option_strings
                if o.startswith("--")
            ],
            "words": [c for a in command._actions if not a.option_strings for c in a.choices or ()],
        }
        for name, command in subparsers.choices.items()
    }


def bash(commands: dict[str, dict[str, Any]]) -> str:
    """Return the script for bash: ``source <(narrows completion bash)``."""
    cases = [f'    {name}) words="{_words(command)}" ;;' for name, command in commands.items()]
    return "\n".join(
        [
            "# narrows completion for bash: source <(narrows completion bash)",
            "_narrows() {",
            '  local words current="${COMP_WORDS[COMP_CWORD]}"',
            '  case "$COMP_CWORD" in',
            f'  1) words="{" ".join(commands)} --help --version" ;;',
            '  *) case "${COMP_WORDS[1]}" in',
            *cases,
            "    esac ;;",
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _narrows narrows",
            "",
        ]
    )


def _words(command: dict[str, Any]) -> str:
    return " ".join([*command["words"], *(o for o, _ in command["options"])])


def zsh(commands: dict[str, dict[str, Any]]) -> str:
    """Return the script for zsh: ``source <(narrows completion zsh)``."""
    described = [f"    {_zsh_item(n, c['summary'])}" for n, c in commands.items()]
    cases = []
    for name, command in commands.items():
        items = [_zsh_item(o, text) for o, text in command["options"]]
        items += [_zsh_item(w, "") for w in command["words"]]
        cases.append(f"  {name}) words=({' '.join(items)}) ;;")
    return "\n".join(
        [
            "#compdef narrows",
            "# narrows completion for zsh: source <(narrows completion zsh)",
            "_narrows() {",
            "  local -a commands words_",
            "  commands=(",
            *described,
            "  )",
            "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
            '  case "$words[2]" in',
            *(c.replace(" words=", " words_=") for c in cases),
            "  esac",
            "  _describe option words_; _files",
            "}",
            "compdef _narrows narrows",
            "",
        ]
    )


def _zsh_item(word: str, text: str) -> str:
    return "'" + f"{word}:{text}".replace("'", "") + "'"


def fish(commands: dict[str, dict[str, Any]]) -> str:
    """Return the script for fish: ``narrows completion fish | source``."""
    lines = ["# narrows completion for fish: narrows completion fish | source"]
    for name, command in commands.items():
        first = f"complete -c narrows -n __fish_use_subcommand -f -a {name}"
        lines.append(f"{first} -d '{_plain(command['summary'])}'")
        inside = f"complete -c narrows -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{inside} -l {o[2:]} -d '{_plain(text)}'" for o, text in command["options"]]
        lines += [f"{inside} -f -a {word}" for word in command["words"]]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("'", "")
