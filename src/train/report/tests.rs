//! Tests of the page: what it shows, and that nothing in it can act.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::train::recipe::Stage;

fn recipe(from: &str) -> Recipe {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!("model.from = {from:?}\nrun.output = \"out\"\ndata.source = [{{ path = \"d\" }}]\n");
    std::fs::write(file.path(), text).unwrap();
    Recipe::load(Stage::Dpo, file.path(), &[]).unwrap()
}

fn record(step: u64, kind: Kind, values: &[(&str, f64)]) -> Record {
    Record { step, kind, values: values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect() }
}

fn page(from: &str, records: &[Record]) -> String {
    let files = [DataFile { path: "<img src=x>.jsonl".into(), blake3: "00ff".into(), rows: 7 }];
    Report { recipe: &recipe(from), files: &files, records }.render()
}

#[test]
fn the_page_shows_curves_final_values_recipe_and_data() {
    let eval = || Kind::Eval("eval".into());
    let records = [
        record(0, eval(), &[("loss", 0.7)]),
        record(1, Kind::Train, &[("loss", 0.69), ("rewards/chosen", -0.5), ("learning_rate", 5e-7)]),
        record(2, Kind::Train, &[("loss", f64::NAN), ("rewards/chosen", -1.26)]),
        record(2, eval(), &[("loss", 0.25)]),
    ];
    let text = page("org/name", &records);
    assert_eq!(text.matches("<svg").count(), 3);
    assert_eq!(text.matches("<polyline class=\"eval\"").count(), 1);
    assert_eq!(text.matches("<circle class=\"train\"").count(), 1 + 2 + 1, "NaN has no place in a chart");
    for part in [
        "<tr><th>metric</th><th>eval</th><th>train</th></tr>",
        "<tr><th>loss</th><td>0.25</td><td>NaN</td></tr>",
        "<tr><th>rewards/chosen</th><td></td><td>-1.26</td></tr>",
        "<td>5.000e-7</td>",
        "<td>7</td><td><code>00ff</code></td>",
        "beta = 0.1",
        "prefers-color-scheme: dark",
        "2 steps",
    ] {
        assert!(text.contains(part), "{text}\nlacks {part}");
    }
    assert!(page("org/name", &[]).contains("0 steps"));
}

#[test]
fn nothing_on_the_page_can_act_or_load() {
    let hostile = "\"><script>alert('1')</script>&";
    let records = [
        record(1, Kind::Eval(hostile.into()), &[("loss", 1.0), (hostile, 2.0)]),
        record(2, Kind::Train, &[("loss", 1.0)]),
    ];
    let text = page(hostile, &records).to_lowercase();
    for part in ["<script", "<img", "http://", "https://", "url(", "@import", "<link", "<iframe"] {
        assert!(!text.contains(part), "{part}");
    }
    assert!(text.contains("&quot;&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;"));
}

#[test]
fn numbers_have_five_digits() {
    for (value, text) in [
        (0.0, "0"),
        (1.0, "1"),
        (-1.26, "-1.26"),
        (123.456_789, "123.46"),
        (99_999.9, "100000"),
        (1234.0, "1234"),
        (0.001_234_56, "0.0012346"),
        (5e-7, "5.000e-7"),
        (1.5e9, "1.500e9"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
        (2000.0, "2000"),
    ] {
        assert_eq!(number(value), text);
    }
}

#[test]
fn the_page_is_written_whole() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("report.html");
    let report = Report { recipe: &recipe("a/b"), files: &[], records: &[] };
    report.write(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), report.render());
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
}
