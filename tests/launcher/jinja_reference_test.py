#!/usr/bin/python3
"""jinja_cases.json holds what Jinja itself prints, in the settings of transformers: this asks Jinja again.

A case is [template, text], the text null where rendering fails. jinja_test.cc holds shoal to the same file.
"""
import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

NOW = datetime.datetime.fromtimestamp(1718000000, tz=datetime.timezone.utc)


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant wrote; for the text it is a scope and nothing else."""
    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('body'), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def make_environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters['tojson'] = tojson
    env.globals['raise_exception'] = raise_exception
    env.globals['strftime_now'] = NOW.strftime
    return env


def render(env, template, context):
    try:
        return env.from_string(template).render(**json.loads(json.dumps(context)))
    except Exception:  # whatever it is: rendering failed
        return None


def main():
    path = pathlib.Path(__file__).with_name('jinja_cases.json')
    env, checked, wrong = make_environment(), 0, 0
    for group in json.loads(path.read_text(encoding='utf-8')):
        for template, expected in group['cases']:
            found = render(env, template, group['context'])
            checked += 1
            if found != expected:
                wrong += 1
                print(f'{group["name"]}: {template!r}\n  Jinja {jinja2.__version__}: {found!r}\n  file: {expected!r}')
    print(f'{checked} cases, {wrong} wrong')
    return 1 if wrong or not checked else 0


if __name__ == '__main__':
    sys.exit(main())
