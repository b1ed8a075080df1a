'use strict';
// How text that cannot be seen is shown, on every page; saejax/unicode.py has the same for Python.

/** Text on one line: a line break becomes ↵, a tab ⇥, another control character ·. */
const visibleText = (text) =>
  String(text).replace(/\r\n|[\n\r\u0085\u2028\u2029]/g, '↵').replace(/\t/g, '⇥').replace(/[\u0000-\u001f\u007f]/g, '·');

/** A token: its spaces, too, become ␣, and invisible characters their numbers. */
const visibleToken = (text) => visibleInLine(text).replaceAll(' ', '␣');

/** A token in a line of text: spaces stay, unless it is nothing else. */
function visibleInLine(text) {
  if (text === '') return '∅';
  const hex = (c) => '\\u' + c.codePointAt(0).toString(16).padStart(4, '0');
  const shown = visibleText(text).replace(/\u00a0/g, '⍽').replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, hex);
  return shown.replaceAll(' ', '') ? shown : shown.replaceAll(' ', '␣');
}
