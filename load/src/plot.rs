//! Line plots: SVG inside a page, or a picture of its own.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
/// Above each plot of a picture, and above all.
const HEADING: f64 = 28.0;

pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// The horizontal axis.
pub(crate) struct Axis {
    pub(crate) title: &'static str,
    /// Positions with a label.
    pub(crate) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Seconds from 0 to the end of the longest series.
    pub(crate) fn seconds(series: &[Series]) -> Self {
        let last = series.iter().filter_map(|series| series.points.last());
        let end = last.map(|point| point.0).fold(0.0, f64::max);
        let ticks = steps(end).into_iter().filter(|tick| *tick <= end * 1.001);
        Self { title: "seconds", ticks: ticks.map(|tick| (tick, format!("{tick}"))).collect() }
    }
}

/// Series over one axis. Values start at 0.
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) unit: &'static str,
    pub(crate) axis: Axis,
    pub(crate) series: Vec<Series>,
}

impl Plot {
    /// For a page.
    pub(crate) fn figure(&self) -> String {
        let (title, legend) = (escape(&self.title), legend(&self.series));
        format!(
            "<figure><figcaption><b>{title}</b> <span>{}</span>{legend}</figcaption>\
             <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">{}</svg></figure>",
            self.unit,
            self.drawing()
        )
    }

    fn drawing(&self) -> String {
        let Self { axis, series, .. } = self;
        let points = || series.iter().flat_map(|series| &series.points);
        let ends = axis.ticks.iter().map(|tick| tick.0).chain(points().map(|point| point.0));
        let right = ends.fold(f64::MIN_POSITIVE, f64::max);
        let steps = steps(points().map(|point| point.1).fold(0.0, f64::max));
        let top = steps.last().copied().unwrap_or(1.0);
        let x = |value: f64| LEFT + value / right * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM);
        let mut svg = String::new();
        for step in &steps {
            let (at, end, label) = (y(*step), WIDTH - RIGHT, label(*step));
            line(&mut svg, format_args!("<path class=\"grid\" d=\"M{LEFT} {at:.1}H{end}\"/>"));
            let place = (LEFT - 8.0, at + 4.0);
            line(
                &mut svg,
                format_args!(
                    "<text x=\"{:.1}\" y=\"{:.1}\" class=\"y\">{label}</text>",
                    place.0, place.1
                ),
            );
        }
        for (value, label) in &axis.ticks {
            let at = (x(*value), HEIGHT - BOTTOM + 16.0);
            line(&mut svg, format_args!("<text x=\"{:.1}\" y=\"{}\">{label}</text>", at.0, at.1));
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        let title = axis.title;
        line(&mut svg, format_args!("<text x=\"{middle}\" y=\"{}\">{title}</text>", HEIGHT - 6.0));
        for (index, series) in series.iter().enumerate() {
            let mut path = String::new();
            for (nth, point) in series.points.iter().enumerate() {
                let verb = if nth == 0 { 'M' } else { 'L' };
                line(&mut path, format_args!("{verb}{:.1} {:.1}", x(point.0), y(point.1)));
            }
            let name = escape(&series.name);
            line(
                &mut svg,
                format_args!(
                    "<path class=\"line s{index}\" d=\"{path}\"><title>{name}</title></path>"
                ),
            );
        }
        svg
    }
}

/// Plots below each other, as a file of its own.
pub(crate) fn picture(style: &str, heading: &str, plots: &[Plot]) -> String {
    let height = HEADING + (HEADING + HEIGHT) * plots.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\"><style>{style}</style>\
         <rect width=\"{WIDTH}\" height=\"{height}\" class=\"paper\"/>\
         <text x=\"8\" y=\"20\" class=\"start\">{}</text>\n",
        escape(heading)
    );
    for (nth, plot) in plots.iter().enumerate() {
        let top = HEADING + (HEADING + HEIGHT) * nth as f64;
        let title = escape(&plot.title);
        let mut names = format!("<tspan class=\"ink\">{title}</tspan> {}", plot.unit);
        for (index, series) in plot.series.iter().enumerate().filter(|_| plot.series.len() > 1) {
            names += &format!(" <tspan class=\"s{index}\">— {}</tspan>", escape(&series.name));
        }
        line(
            &mut svg,
            format_args!(
                "<g transform=\"translate(0 {top})\"><text x=\"8\" y=\"20\" class=\"start\">{names}</text>\
                 <g transform=\"translate(0 {HEADING})\">{}</g></g>\n",
                plot.drawing()
            ),
        );
    }
    svg + "</svg>\n"
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String takes all that is written");
}

/// One series needs no legend: the title names it.
fn legend(series: &[Series]) -> String {
    if series.len() < 2 {
        return String::new();
    }
    let entry = |(index, series): (usize, &Series)| {
        format!("<i class=\"s{index}\"></i>{}", escape(&series.name))
    };
    let entries: Vec<_> = series.iter().enumerate().map(entry).collect();
    format!("<span class=\"legend\">{}</span>", entries.join(" "))
}

/// Round numbers from 0 to at least `end`, four to six of them.
fn steps(end: f64) -> Vec<f64> {
    if end <= 0.0 {
        return vec![0.0, 1.0];
    }
    let rough = end / 4.0;
    let magnitude = 10_f64.powf(rough.log10().floor());
    let nice = [1.0, 2.0, 2.5, 5.0, 10.0];
    let step = nice.into_iter().find(|nice| nice * magnitude >= rough).unwrap_or(10.0) * magnitude;
    let count = (end / step - 1e-9).ceil() as u32;
    (0..=count).map(|nth| round(f64::from(nth) * step)).collect()
}

/// Without the dust of binary fractions.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

fn label(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{}M", round(value / 1e6)),
        value if value >= 1e4 => format!("{}k", round(value / 1e3)),
        value => format!("{value}"),
    }
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_and_reach_the_end() {
        assert_eq!(steps(1.0), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(steps(187_000.0), [0.0, 50_000.0, 100_000.0, 150_000.0, 200_000.0]);
        assert_eq!(steps(0.07), [0.0, 0.02, 0.04, 0.06, 0.08]);
        assert_eq!(steps(0.0), [0.0, 1.0]);
    }

    #[test]
    fn a_line_goes_from_the_left_below_to_the_right_above() {
        let series = [Series { name: "a<b".to_owned(), points: vec![(0.0, 0.0), (10.0, 4.0)] }];
        let axis = Axis::seconds(&series);
        let plot = Plot { title: "rate".to_owned(), unit: "/s", axis, series: series.into() };
        let svg = plot.figure();
        let (left, bottom) = (LEFT, HEIGHT - BOTTOM);
        let (right, top) = (WIDTH - RIGHT, TOP);
        let path = format!("d=\"M{left:.1} {bottom:.1}L{right:.1} {top:.1}\"");
        assert!(svg.contains(&path), "{svg}");
        assert!(svg.contains("a&lt;b"), "{svg}");
        let picture = picture("", "soak & storm", &[plot]);
        assert!(picture.contains(&path) && picture.contains("soak &amp; storm"), "{picture}");
    }
}
