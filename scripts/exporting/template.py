"""The chat template as llama.cpp's Jinja can render it.

Its `tojson` cannot sort keys, and its strings have no `isdigit`. A macro and `strip` do the same.
"""

SORTED = "(tools | tojson(separators=(',', ':'), sort_keys=True))"
NUMBER = "given[prefix | length:]"
IS_NUMBER = f"({NUMBER} and not {NUMBER}.strip('0123456789'))"
MACRO = """\
{%- macro sorted_json(value) -%}
  {%- if value is mapping -%}
    {{- '{' -}}
    {%- for key, each in value | dictsort(true) -%}
      {{- (',' if loop.index0 else '') ~ (key | tojson) ~ ':' ~ sorted_json(each) -}}
    {%- endfor -%}
    {{- '}' -}}
  {%- elif value is sequence and value is not string -%}
    {{- '[' -}}
    {%- for each in value -%}
      {{- (',' if loop.index0 else '') ~ sorted_json(each) -}}
    {%- endfor -%}
    {{- ']' -}}
  {%- else -%}
    {{- value | tojson -}}
  {%- endif -%}
{%- endmacro -%}
"""


def llama_template(template: str) -> str:
    """A chat template that llama.cpp renders to the same text."""
    found = template.replace(f"{NUMBER}.isdigit()", IS_NUMBER)
    return MACRO + found.replace(SORTED, "sorted_json(tools)") if SORTED in found else found
