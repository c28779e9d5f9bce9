//! One chart as SVG: axes with round numbers and a line for each set of rows.

use std::fmt::Write;

use super::{escaped, number};

/// Size of the picture and of the room that the numbers of the axes take.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
/// More points than this would not be seen apart: a line has that many pixels at most.
const POINTS_MAX: usize = 600;
/// Up to this many points are marked each by a dot.
const DOTS_MAX: usize = 60;
/// Intervals of an axis, about.
const INTERVALS: f64 = 4.0;
/// Larger values are drawn at the edge, so that no difference of two is infinite.
const VALUE_MAX: f64 = 1e300;

/// The values of one metric on one set of rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    /// Name of the rows.
    pub(super) split: String,
    /// Class of the style.
    pub(super) class: &'static str,
    /// Step and value, all finite and in the order of steps.
    pub(super) points: Vec<(f64, f64)>,
}

/// Draws `curves`, which must have points.
pub(super) fn svg(curves: &[Curve], label: &str) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (x, y) = (Axis::over(points().map(|point| point.0)), Axis::over(points().map(|point| point.1)));
    let place_x = |value: f64| LEFT + x.share(value) * (WIDTH - LEFT - RIGHT);
    let place_y = |value: f64| HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM);
    let mut text = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", escaped(label));
    // Writing to a String cannot fail.
    for tick in y.ticks() {
        let height = place_y(tick);
        let end = WIDTH - RIGHT;
        let _ = write!(text, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{height:.1}\" x2=\"{end}\" y2=\"{height:.1}\"/>");
        let (x, y) = (LEFT - 6.0, height + 4.0);
        let _ = write!(text, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", number(tick));
    }
    for tick in x.ticks() {
        let (x, y) = (place_x(tick), HEIGHT - 6.0);
        let _ = write!(text, "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", number(tick));
    }
    for curve in curves {
        let shown = thinned(&curve.points);
        let places: Vec<String> =
            shown.iter().map(|(step, value)| format!("{:.1},{:.1}", place_x(*step), place_y(*value))).collect();
        let class = curve.class;
        let split = escaped(&curve.split);
        let _ = write!(
            text,
            "<polyline class=\"{class}\" points=\"{}\"><title>{split}</title></polyline>",
            places.join(" ")
        );
        if shown.len() <= DOTS_MAX {
            for (step, value) in shown {
                let (x, y) = (place_x(step), place_y(value));
                let hint = format!("{split}, step {step}: {}", number(value));
                let _ = write!(
                    text,
                    "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\"><title>{hint}</title></circle>"
                );
            }
        }
    }
    text + "</svg>"
}

/// At most [`POINTS_MAX`] points: means of neighbours, so that a spike is not passed over; the last one stays as it is.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let count = chunk.len() as f64;
        (chunk.iter().map(|point| point.0).sum::<f64>() / count, chunk.iter().map(|point| point.1).sum::<f64>() / count)
    };
    match points {
        [head @ .., last] if width > 1 => head.chunks(width).map(mean).chain([*last]).collect(),
        points => points.to_vec(),
    }
}

/// A range that ends at round numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    low: f64,
    interval: f64,
    intervals: f64,
}

impl Axis {
    /// Holds all `values`, which are finite.
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = (low.clamp(-VALUE_MAX, VALUE_MAX), high.clamp(-VALUE_MAX, VALUE_MAX));
        // A line that does not move is drawn in the middle.
        let margin = if high > low { 0.0 } else { (low.abs() * 0.1).max(1e-12) };
        let (low, high) = (low - margin, high + margin);
        let raw = (high / INTERVALS - low / INTERVALS).clamp(f64::MIN_POSITIVE, f64::MAX / 100.0);
        let power = 10f64.powf(raw.log10().floor());
        let interval = [1.0, 2.0, 2.5, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= raw);
        let interval = interval.unwrap_or(raw);
        let first = (low / interval).floor();
        Self { low: first * interval, interval, intervals: ((high / interval).ceil() - first).max(1.0) }
    }

    /// Where `value` lies between the ends, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        ((value - self.low) / self.interval / self.intervals).clamp(0.0, 1.0)
    }

    fn ticks(self) -> impl Iterator<Item = f64> {
        // The product may come out as 1e-17 where 0 is meant.
        let round = move |value: f64| if value.abs() < self.interval * 1e-9 { 0.0 } else { value };
        (0..=self.intervals as usize).map(move |index| round(self.low + index as f64 * self.interval))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[track_caller]
    fn check_ticks(values: &[f64], expected: &[f64]) {
        let found: Vec<f64> = Axis::over(values.iter().copied()).ticks().collect();
        let near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-9 * b.abs().max(1e-9));
        assert!(found.len() == expected.len() && near, "{found:?} for {expected:?}");
    }

    #[test]
    fn axes_end_at_round_numbers() {
        check_ticks(&[0.0, 100.0], &[0.0, 25.0, 50.0, 75.0, 100.0]);
        check_ticks(&[-1.26, 0.4], &[-1.5, -1.0, -0.5, 0.0, 0.5]);
        check_ticks(&[2e-8, 5e-7], &[0.0, 2e-7, 4e-7, 6e-7]);
        for value in [0.0, 3.0, -1e-9, 1e300, f64::MAX, f64::MIN_POSITIVE] {
            for other in [value, -value, 1.0] {
                let axis = Axis::over([value, other].into_iter());
                let share = axis.share(value);
                assert!((0.0..=1.0).contains(&share) && axis.intervals <= 20.0, "{value} {other}: {axis:?}");
                assert!(axis.ticks().count() <= 21);
            }
        }
    }

    #[test]
    fn points_are_inside_the_picture_and_at_their_place() {
        let curve = Curve { split: "a<b".into(), class: "train", points: vec![(0.0, 0.0), (100.0, 100.0)] };
        let text = svg(&[curve], "x\"y");
        let corners = format!("points=\"{LEFT:.1},{:.1} {:.1},{TOP:.1}\"", HEIGHT - BOTTOM, WIDTH - RIGHT);
        assert!(text.contains(&corners), "{text}");
        assert!(text.contains("a&lt;b, step 100: 100") && text.contains("x&quot;y"), "{text}");
    }

    #[test]
    fn many_points_become_few_that_keep_mean_and_end() {
        let points: Vec<(f64, f64)> = (0..10_001).map(|step| (f64::from(step), 1.0)).collect();
        let shown = thinned(&points);
        assert!(shown.len() <= POINTS_MAX + 1 && shown.iter().all(|point| point.1 == 1.0));
        assert_eq!(shown.last(), points.last());
        assert_eq!(thinned(&points[..POINTS_MAX]), points[..POINTS_MAX]);
        assert!(thinned(&[]).is_empty());
    }
}
