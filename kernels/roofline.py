#!/usr/bin/env python3
"""Draws the roofline of this machine and where the products stand, as SVG.

    shoal bench --kernels -t 2 -o json > kernels.json
    kernels/roofline.py kernels.json > kernels/roofline.svg

Across: operations for each byte of weights that is read; up: operations per second. Both scales are
logarithmic. Lines are what the same program measured: the slope is memory, the flat parts arithmetic.
"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 520, 70, 150, 40, 50
X_RANGE, Y_RANGE = (0.25, 4096.0), (5.0, 12000.0)  # ops per byte, Gop/s
LEGEND_ROWS = 7
COLORS = ['#1b6ca8', '#c0392b', '#27854a', '#8e44ad', '#b9770e', '#117a8b', '#7f5539', '#5d6d7e']


def x_of(v):
    lo, hi = (math.log10(b) for b in X_RANGE)
    return LEFT + (math.log10(v) - lo) / (hi - lo) * (WIDTH - LEFT - RIGHT)


def y_of(v):
    lo, hi = (math.log10(b) for b in Y_RANGE)
    return HEIGHT - BOTTOM - (math.log10(v) - lo) / (hi - lo) * (HEIGHT - TOP - BOTTOM)


def text(x, y, s, size=12, anchor='start', color='#333', rotate=None):
    turn = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ''
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{color}"{turn}>{s}</text>')


def line(x1, y1, x2, y2, color, width=1.0, dash=''):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}" stroke-dasharray="{dash}"/>')


def grid():
    out = []
    for power in range(-1, 5):
        v = 10.0 ** power
        if X_RANGE[0] <= v <= X_RANGE[1]:
            out.append(line(x_of(v), TOP, x_of(v), HEIGHT - BOTTOM, '#ddd'))
            out.append(text(x_of(v), HEIGHT - BOTTOM + 18, f'{v:g}', anchor='middle'))
        if Y_RANGE[0] <= v <= Y_RANGE[1]:
            out.append(line(LEFT, y_of(v), WIDTH - RIGHT, y_of(v), '#ddd'))
            out.append(text(LEFT - 8, y_of(v) + 4, f'{v:g}', anchor='end'))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, 'operations per byte of weights',
                    anchor='middle'))
    out.append(text(20, (TOP + HEIGHT - BOTTOM) / 2, 'Gop/s', anchor='middle', rotate=-90))
    return out


def roofs(limits):
    """The slope of memory up to each flat roof of arithmetic."""
    read, out = limits['read_gb_per_s'], []
    top = 0.0
    for name, key in (('f32', 'f32_gflops'), ('bf16 tiles', 'bf16_gflops'), ('int8', 'int8_gops')):
        peak = limits[key]
        if peak <= 0:
            continue
        ridge = peak / read
        out.append(line(x_of(ridge), y_of(peak), WIDTH - RIGHT, y_of(peak), '#444', 1.5))
        out.append(text(WIDTH - RIGHT + 6, y_of(peak) + 4, f'{name}: {peak:.0f}'))
        top = max(top, peak)
    start = max(X_RANGE[0], Y_RANGE[0] / read)
    out.append(line(x_of(start), y_of(start * read), x_of(top / read), y_of(top), '#444', 1.5))
    out.append(text(x_of(1) - 12, y_of(read) - 8, f'{read:.1f} GB/s', anchor='end'))
    return out


def points(results):
    out = []
    types = list(dict.fromkeys(r['type'] for r in results))
    for i, name in enumerate(types):
        color = COLORS[i % len(COLORS)]
        hollow = i >= len(COLORS)
        for r in (r for r in results if r['type'] == name):
            x, y = x_of(r['gops'] / r['gb_per_s']), y_of(r['gops'])
            size = 4.5
            style = f'fill="{"white" if hollow else color}" stroke="{color}" stroke-width="1.5"'
            if r['phase'] == 'decode':
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {style}/>')
            else:
                out.append(f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" '
                           f'height="{2 * size}" {style}/>')
        x = WIDTH - RIGHT - 90 * ((len(types) - 1) // LEGEND_ROWS + 1 - i // LEGEND_ROWS)
        y = HEIGHT - BOTTOM - 18 * (LEGEND_ROWS - i % LEGEND_ROWS)
        style = f'fill="{"white" if hollow else color}" stroke="{color}" stroke-width="1.5"'
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="4.5" {style}/>')
        out.append(text(x + 12, y, name))
    return out


def main():
    with open(sys.argv[1], encoding='utf-8') as f:
        report = json.load(f)
    limits = report['limits']
    title = (f"{limits['level']}, {limits['threads']} threads: "
             'one row (circles) and a batch (squares)')
    body = grid() + roofs(limits) + points(report['results']) + [text(LEFT, 24, title, 14)]
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
          'font-family="sans-serif">')
    print(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    print('\n'.join(body))
    print('</svg>')


if __name__ == '__main__':
    main()
