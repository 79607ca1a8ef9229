/* Decodes a window of a JPEG: what lies around it is parsed but neither transformed nor converted.
 * libjpeg-turbo can do that; no Python package hands it on. All of the file is parsed: overwritten
 * bytes mostly decode to some blocks, and only their count shows, at the end, that something is wrong.
 *
 * decode(data, out, factor, x, y, width, height) -> 1, or 0 for what the caller should decode in
 * another way. Writes (height, width, 3) RGB bytes to `out`: the pixels [x, x + width) x
 * [y, y + height) of the image at 1 / factor, equal to those of a decoder that is given all of it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "needs the headers of libjpeg-turbo 2.1 or newer"
#endif

/* Smooth upsampling looks at neighbouring samples. At an edge of what is decoded it has none, so
 * that the window is decoded with a rim of so many blocks' worth of samples, which is dropped. */
enum { RIM = 16 };

#if JPEG_LIB_VERSION >= 70
#define SIZE_OF(component) ((component)->DCT_h_scaled_size)
#define LEAST_SIZE(codec) ((codec)->min_DCT_h_scaled_size)
#else
#define SIZE_OF(component) ((component)->DCT_scaled_size)
#define LEAST_SIZE(codec) ((codec)->min_DCT_scaled_size)
#endif

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf leave;
} Errors;

static void leave(j_common_ptr codec) { longjmp(((Errors *)codec->err)->leave, 1); }

/* Level -1 is a warning: the data are damaged, and libjpeg would guess what was there. */
static void message(j_common_ptr codec, int level) {
  if (level < 0) leave(codec);
}

static void silent(j_common_ptr codec) { (void)codec; }

typedef struct {
  const unsigned char *data;
  Py_ssize_t size;
  unsigned char *out;
  unsigned factor, x, y, width, height;
} Request;

/* Whether libjpeg makes of a window what it makes of the whole. It does not where
 * - scans of a progressive file are missing: their edges are smoothed by looking at further blocks;
 * - colours are both decoded at a larger scale than the light, and enlarged (4:1:0 at 1/2): they are
 *   enlarged for a part of the window only, and beside it stands what was in memory. */
static int windows_are_exact(const struct jpeg_decompress_struct *codec) {
  for (int i = 0; i < codec->num_components; i++) {
    const jpeg_component_info *component = &codec->comp_info[i];
    const int size = SIZE_OF(component), least = LEAST_SIZE(codec);
    const int enlarged = component->h_samp_factor * size != codec->max_h_samp_factor * least ||
                         component->v_samp_factor * size != codec->max_v_samp_factor * least;
    if (size != least && enlarged) return 0;
    for (int at = 0; codec->progressive_mode && at < DCTSIZE2; at++)
      if (codec->coef_bits[i][at]) return 0;
  }
  return 1;
}

static int decode_rows(struct jpeg_decompress_struct *codec, Errors *errors, const Request *request,
                       unsigned char **line) {
  if (setjmp(errors->leave)) return 0;
  jpeg_create_decompress(codec);
  jpeg_mem_src(codec, request->data, (unsigned long)request->size);
  jpeg_read_header(codec, TRUE);
  codec->scale_num = 1;
  codec->scale_denom = request->factor;
  codec->out_color_space = JCS_RGB;
  codec->dct_method = JDCT_ISLOW;
  jpeg_start_decompress(codec);
  if (request->x + request->width > codec->output_width ||
      request->y + request->height > codec->output_height || codec->output_components != 3 ||
      !windows_are_exact(codec))
    return 0;

  JDIMENSION left = request->x > RIM ? request->x - RIM : 0;
  JDIMENSION right = request->x + request->width + RIM;
  JDIMENSION top = request->y > RIM ? request->y - RIM : 0;
  if (right > codec->output_width) right = codec->output_width;
  JDIMENSION columns = right - left;
  if (columns < codec->output_width) jpeg_crop_scanline(codec, &left, &columns);
  if (top) jpeg_skip_scanlines(codec, top);
  *line = malloc((size_t)codec->output_width * 3);
  if (!*line) return 0;

  const size_t skipped = (size_t)(request->x - left) * 3, stride = (size_t)request->width * 3;
  const JDIMENSION end = request->y + request->height;
  while (codec->output_scanline < end) {
    const JDIMENSION row = codec->output_scanline;
    if (jpeg_read_scanlines(codec, line, 1) != 1) return 0;
    if (row >= request->y)
      memcpy(request->out + (row - request->y) * stride, *line + skipped, stride);
  }
  /* All but the last line: of a skip to the very end nothing is parsed. */
  if (codec->output_height - codec->output_scanline > 1)
    jpeg_skip_scanlines(codec, codec->output_height - codec->output_scanline - 1);
  while (codec->output_scanline < codec->output_height)
    if (jpeg_read_scanlines(codec, line, 1) != 1) return 0;
  jpeg_finish_decompress(codec);
  return 1;
}

static int decode_window(const Request *request) {
  struct jpeg_decompress_struct codec;
  Errors errors;
  unsigned char *line = NULL;
  memset(&codec, 0, sizeof codec);
  codec.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.emit_message = message;
  errors.base.output_message = silent;
  const int done = decode_rows(&codec, &errors, request, &line);
  jpeg_destroy_decompress(&codec);
  free(line);
  return done;
}

static PyObject *decode(PyObject *module, PyObject *arguments) {
  (void)module;
  Py_buffer data, out;
  unsigned factor, x, y, width, height;
  if (!PyArg_ParseTuple(arguments, "y*w*IIIII", &data, &out, &factor, &x, &y, &width, &height))
    return NULL;
  int done = 0;
  const int fits = width && height && x <= JPEG_MAX_DIMENSION && width <= JPEG_MAX_DIMENSION &&
                   y <= JPEG_MAX_DIMENSION && height <= JPEG_MAX_DIMENSION &&
                   (Py_ssize_t)height <= out.len / 3 / (Py_ssize_t)width;
  if (fits) {
    const Request request = {data.buf, data.len, out.buf, factor, x, y, width, height};
    Py_BEGIN_ALLOW_THREADS done = decode_window(&request);
    Py_END_ALLOW_THREADS
  }
  PyBuffer_Release(&data);
  PyBuffer_Release(&out);
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "the window is empty, or larger than the buffer");
    return NULL;
  }
  return PyLong_FromLong(done);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, "Decode a window of a JPEG; see jpeg_window.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_jpeg_window", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg_window(void) { return PyModule_Create(&module); }
